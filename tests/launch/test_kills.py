"""Twenty SIGKILLs at seeded moments, half of them in the middle of a save: nothing is lost and nothing is different."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from shoestring.launch.run_dir import read_status
from shoestring.tests.launch.real_run import command, processes_of, train, wait_until
from shoestring.tests.launch.small_run import small_run
from shoestring.trainer.checkpoint.store import CheckpointStore
from shoestring.trainer.telemetry.history import read_all_metrics, read_metrics

KILLS, STEPS, EVERY = 20, 50, 2
EXACT = ("loss", "loss/mtp", "loss/balance", "grad_norm", "bias/min", "bias/max", "expert_load/layer_01", "tokens")


def history(run_dir: Path) -> list[dict[str, Any]]:
    events = [event for event in read_metrics(run_dir / "metrics.jsonl") if event.kind == "step"]
    return [{"step": event.step} | {key: event.values[key] for key in EXACT} for event in events]


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    """Until the run says that it has done this step"""
    assert process.stdout is not None
    for line in process.stdout:
        told = re.match(r"step +(\d+)/", line)
        if told and int(told[1]) >= step:
            return
    raise AssertionError("the run ended before it was killed")


def wait_for_save(store: CheckpointStore, process: subprocess.Popen[str], step: int, later: float) -> None:
    """Until so many seconds after the save of this step has made its directory."""
    while not store.partial(step).exists() and not store.path(step).exists():
        assert process.poll() is None, "the run ended before it was killed"
        os.sched_yield()
    until = time.perf_counter() + later
    while time.perf_counter() < until:
        pass


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_leave_the_losses_of_an_undisturbed_run(tmp_path: Path) -> None:
    overrides = [*small_run(tmp_path, STEPS), f"training.checkpoint_every={EVERY}", "telemetry.log_every=1"]
    overrides += ["model.hidden=128"]  # a save takes a while
    undisturbed = train(overrides, tmp_path / "undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr

    run_dir, moments = tmp_path / "run", random.Random(8)
    store = CheckpointStore(run_dir / "checkpoints", keep=2)
    halves = 0
    for number in range(KILLS):
        resumed = store.steps()[-1] if store.steps() else 0
        process = subprocess.Popen(
            command(overrides, run_dir),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        if number % 2:
            wait_for_step(process, resumed + EVERY - 1)
            wait_for_save(store, process, resumed + EVERY, moments.uniform(0, 0.03))
        else:
            wait_for_step(process, resumed + moments.randint(1, EVERY + 1))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()  # until the last holder of the pipe has gone
        assert process.returncode == -signal.SIGKILL
        wait_until(lambda: not processes_of(run_dir), 20)
        halves += any(store.directory.glob("*.partial"))
        for step in store.steps():
            assert list(store.open(step).damage()) == []
    assert halves >= KILLS // 4, "too few kills hit a save"

    again = train(overrides, run_dir)
    assert again.returncode == 0, again.stderr
    assert read_status(run_dir) == {"exit_code": 0, "reason": f"{STEPS} steps done"}
    assert history(run_dir) == history(tmp_path / "undisturbed")
    events = read_all_metrics(run_dir / "metrics.jsonl")
    assert sum(event.kind == "resume" for event in events) >= KILLS // 2
    assert not any(event.kind == "warning" for event in events)
