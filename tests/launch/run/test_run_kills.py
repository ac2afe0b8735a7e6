"""A run that is killed ten times, launcher and ranks together, at seeded random moments."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from shoestring.tests.launch.real_run import command, lines_as_they_come, train
from shoestring.tests.launch.small_run import small_run
from shoestring.tests.trainer.ledger.small_ledger import read_journal
from shoestring.trainer.ledger.allocation_journal import HEARTBEAT_SECONDS
from shoestring.trainer.ledger.summary import summarize_ledger
from shoestring.trainer.ledger.terms import ALLOCATION_FILE, WORK_FILE

KILLS = 10
FLUSH_SECONDS = 5
MOST_STEPS = 8
STEPS = 6 * MOST_STEPS


def kill_at(run_dir: Path, file: Path, kind: str, count: int, process: subprocess.Popen[str]) -> int:
    """Kill everything when this launch has written `count` records of `kind`; return when, in ns since boot."""
    before = sum(record["kind"] == kind for record in read_journal(run_dir / file))
    seen = 0
    for record in lines_as_they_come(run_dir / file, process):
        seen += record["kind"] == kind
        if seen == before + count:
            os.killpg(process.pid, signal.SIGKILL)
            killed = time.monotonic_ns()
            process.wait()
            return killed
    raise AssertionError(f"the run ended with {process.returncode} before its {count}. {kind}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_kills_lose_no_token_and_no_more_than_a_flush_interval(tmp_path: Path) -> None:
    overrides = [*small_run(tmp_path, STEPS), "topology.ep=1", "training.checkpoint_every=3"]
    run_dir, dice = tmp_path / "run", random.Random(7)
    lost_ms = []
    for _ in range(KILLS):
        process = subprocess.Popen(
            command(overrides, run_dir),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        moment = dice.choice([("begin", 1), ("ready", 1), *(("step", dice.randint(1, MOST_STEPS)) for _ in range(3))])
        killed = kill_at(run_dir, WORK_FILE, *moment, process)
        opened = read_journal(run_dir / ALLOCATION_FILE)[-1]
        lost_ms.append(
            (killed - opened["monotonic_ns"]) / 1e6 - summarize_ledger(run_dir).attempt_usages[-1].milliseconds
        )
    finished = train(overrides, run_dir)
    assert finished.returncode == 0, finished.stderr
    summary = summarize_ledger(run_dir)
    assert summary.num_attempts == KILLS + 1
    assert summary.steps_retained == STEPS
    assert summary.tokens_retained == STEPS * 8 * 32 < summary.tokens_consumed
    stepped = summary.productive_ms + summary.rolled_back_ms
    assert summary.allocated_ms == stepped + sum(summary.gpu_ms_by_bucket.values()) + summary.unattributed_ms
    assert summary.unattributed_ms <= 0.03 * summary.allocated_ms
    assert max(lost_ms) <= 1000 * FLUSH_SECONDS
    assert HEARTBEAT_SECONDS < FLUSH_SECONDS
    print(
        f"\nunattributed {summary.unattributed_ms / summary.allocated_ms:.2%}, most lost {max(lost_ms):.0f} ms, "
        f"{summary.gpu_ms_by_bucket}"
    )
