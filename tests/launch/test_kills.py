"""Twenty SIGKILLs at seeded moments, half of them in the middle of a save: nothing is lost and nothing is different."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from shoestring.launch.run_dir import read_status
from shoestring.tests.launch.real_run import command, lines_as_they_come, processes_of, train, wait_until
from shoestring.tests.launch.small_run import small_run
from shoestring.trainer.checkpoint.store import CheckpointStore
from shoestring.trainer.telemetry.history import read_all_metrics, read_metrics

KILLS, STEPS, EVERY = 20, 50, 2
EXACT = ("loss", "loss/mtp", "loss/balance", "grad_norm", "bias/min", "bias/max", "expert_load/layer_01", "tokens")


def history(run_dir: Path) -> list[dict[str, Any]]:
    events = [event for event in read_metrics(run_dir / "metrics.jsonl") if event.kind == "step"]
    return [{"step": event.step} | {key: event.values[key] for key in EXACT} for event in events]


def kill_after_step(run_dir: Path, process: subprocess.Popen[str], step: int) -> None:
    """When a line of the run says that it has done this step."""
    lives = read_all_metrics(run_dir / "metrics.jsonl") if (run_dir / "metrics.jsonl").exists() else []
    for number, event in enumerate(lines_as_they_come(run_dir / "metrics.jsonl", process)):
        if number >= len(lives) and event["kind"] == "step" and event["step"] >= step:
            break
    os.killpg(process.pid, signal.SIGKILL)


def kill_in_a_save(store: CheckpointStore, process: subprocess.Popen[str], step: int, later: float) -> None:
    """So many seconds after the save of this step has made its directory."""
    while not store.partial(step).exists() and not store.path(step).exists():
        assert process.poll() is None, "the run ended before it was killed"
        os.sched_yield()
    until = time.perf_counter() + later
    while time.perf_counter() < until:
        pass
    os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(900)
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
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        if number % 2:
            kill_in_a_save(store, process, resumed + EVERY, moments.uniform(0, 0.03))
        else:
            kill_after_step(run_dir, process, resumed + moments.randint(1, EVERY + 1))
        assert process.wait() == -signal.SIGKILL
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
