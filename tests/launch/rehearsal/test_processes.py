"""The processes of rehearsed ranks: their logs, their deaths, and nothing left behind."""

import os
import signal
import tempfile
import time
from pathlib import Path

import pytest

from shoestring.launch.rehearsal.log import RankLog
from shoestring.launch.rehearsal.processes import RehearsalRequest, max_concurrent_processes, rehearse_ranks
from shoestring.launch.run.launcher import StoppedBySignal
from shoestring.launch.run.torchrun import RanksFailed

FAKE = ("-m", "shoestring.tests.launch.rehearsal.fake_rank")
REQUEST = RehearsalRequest(("experiment=quickstart",), None, 8, "shim.so")


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory for temporary files."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def rehearse(behavior: str, told: list[str], parallel: int = 2) -> tuple[RankLog, ...]:
    return rehearse_ranks(REQUEST, (0, 1, 3), told.append, parallel, (*FAKE, behavior))


def test_logs_come_in_the_order_of_the_ranks_with_a_line_for_each(scratch: Path) -> None:
    told: list[str] = []
    assert [log.rank for log in rehearse("", told)] == [0, 1, 3]
    assert told[0] == "rehearsing 3 rank(s), 2 at a time"
    assert sorted(line.split()[0] for line in told[1:]) == ["1/3", "2/3", "3/3"]
    assert any("rank 3 (pipeline rank 3): 1.5 s, peak 75.16 GB, 0 finding(s)" in line for line in told)
    assert not list(scratch.iterdir())


def test_a_process_that_dies_is_named_with_its_output(scratch: Path) -> None:
    with pytest.raises(
        RanksFailed, match=r"the process of rank 1 exited with 3 and wrote no log; its output:\n  words of r"
    ):
        rehearse("die", [])
    with pytest.raises(RanksFailed, match="rank 0 was killed by signal 9"):
        rehearse("killed", [], parallel=1)
    assert not list(scratch.iterdir())


def test_a_signal_leaves_no_process_and_no_file(scratch: Path, tmp_path: Path) -> None:
    file = tmp_path / "pid"

    def tell(line: str) -> None:
        if line.startswith("1/3"):
            while not (file.exists() and file.read_text()):
                time.sleep(0.01)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(StoppedBySignal) as stopped:
        rehearse_ranks(REQUEST, (0, 1, 3), tell, 2, (*FAKE, f"hang={file}"))
    assert stopped.value.exit_code == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)
    assert not list(scratch.iterdir())


def test_there_is_always_room_for_one() -> None:
    assert 1 <= max_concurrent_processes() <= (os.cpu_count() or 1)
