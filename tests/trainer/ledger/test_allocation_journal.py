"""The launcher's half of the ledger."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.tests.trainer.ledger.small_ledger import RANKS, Time, begin, do_steps, launch
from shoestring.trainer.ledger.summary import summarize_ledger


def test_a_killed_launcher_has_held_its_gpus_to_its_last_heartbeat(tmp_path: Path, time: Time) -> None:
    allocation = launch(tmp_path, "a")
    time.pass_ms(1000)
    allocation.write_heartbeat()
    assert summarize_ledger(tmp_path).allocated_ms == RANKS * 1000
    work = begin(tmp_path, "a")
    do_steps(work, time, 1, 2)
    time.pass_ms(9000)  # this time is unattributed
    summary = summarize_ledger(tmp_path)
    assert summary.allocated_ms == RANKS * 1200
    assert summary.is_running


LAUNCHER = """
import sys, time
from pathlib import Path
from shoestring.trainer.ledger.allocation_journal import AllocationJournal
from shoestring.trainer.ledger.config import BudgetConfig
AllocationJournal(Path(sys.argv[1]), ranks=4, attempt="a", budget=BudgetConfig(gpu_hours=0.5), heartbeat_seconds=0.01)
print("open", flush=True)
sys.stdin.read()
"""


@pytest.mark.timeout(60)
def test_a_real_launcher_beats_until_it_is_killed_and_the_next_continues(tmp_path: Path) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "open\n"
    while summarize_ledger(tmp_path).allocated_ms < 4 * 50:
        assert launcher.poll() is None
    with pytest.raises(ConfigError, match="already active"):
        launch(tmp_path, "b")
    launcher.send_signal(signal.SIGKILL)
    launcher.communicate()
    held = summarize_ledger(tmp_path)
    assert held.is_running
    launch(tmp_path, "b").close("done")
    summary = summarize_ledger(tmp_path)
    assert summary.num_attempts == 2
    assert held.allocated_ms <= summary.allocated_ms
    assert not summary.is_running
