"""Twenty SIGKILLs at seeded moments, half of them during a save: nothing is lost and nothing changes.

`tests/launch/run/test_train.py` kills a run under a real torchrun once.
"""

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from shoestring.tests.processes import RanksFailed, World, run_processes
from shoestring.tests.trainer.resumed_loop import train_on, tree_of
from shoestring.tests.trainer.small_loop import prepared_root
from shoestring.trainer import loop
from shoestring.trainer.checkpoint import saver
from shoestring.trainer.checkpoint.store import CheckpointStore
from shoestring.trainer.telemetry.history import read_all_metrics, read_metrics

KILLS, STEPS, EVERY = 20, 84, 2
EXACT = (
    "loss",
    "loss/mtp",
    "loss/seq_aux",
    "grad_norm",
    "bias/min",
    "bias/max",
    "tokens_per_expert/layer_01",
    "tokens",
)


def dying(function: Callable[..., Any], call: int, later: float) -> Callable[..., Any]:
    """Return `function`, but this process dies `later` seconds after the given call began, wherever it then is."""
    calls = iter(range(1, call + 1))

    def die() -> None:
        until = time.perf_counter() + later
        while time.perf_counter() < until:
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(*arguments: Any) -> Any:
        if next(calls, None) == call:
            threading.Thread(target=die).start()
        return function(*arguments)

    return wrapped


def train_until_killed(world: World, tree: dict[str, Any], attempt: int) -> None:
    """Train; even attempts die after a step, odd ones in a save: while ranks write, or while the first one commits."""
    moments = random.Random(attempt)
    target: Any = [loop, saver, loop, CheckpointStore][attempt % 4]
    name = ["poll_save", "write_rank_file", "poll_save", "commit_save"][attempt % 4]
    # An attempt then advances by two or four steps.
    call = 2 if attempt % 2 else moments.randint(EVERY + 1, 2 * EVERY + 1)
    with patch.object(target, name, dying(getattr(target, name), call, moments.uniform(0, 0.02))):
        train_on(world, tree)


def history(run_dir: Path) -> list[dict[str, Any]]:
    events = [event for event in read_metrics(run_dir / "metrics.jsonl") if event.kind == "step"]
    return [{"step": event.step} | {key: event.values[key] for key in EXACT} for event in events]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_leave_the_losses_of_an_undisturbed_run(tmp_path: Path) -> None:
    root = prepared_root(tmp_path, words=4000)
    tree = tree_of(root, tmp_path / "run", "ep2", STEPS, checkpoint_every=EVERY)
    store, halves = CheckpointStore(tmp_path / "run" / "checkpoints", keep_last=2), 0
    for attempt in range(KILLS):
        for leftover in store.directory.glob("*.partial"):  # of an earlier attempt: the next save would remove it
            shutil.rmtree(leftover)
        with pytest.raises(RanksFailed, match="died with exit code -9"):
            run_processes(2, train_until_killed, tree, attempt)
        halves += attempt % 2 == 1 and any(store.directory.glob("*.partial"))
        for step in store.steps():
            assert list(store.open(step).find_damage()) == []
    assert halves >= 2 * KILLS // 5, "too few kills hit a save"
    assert store.steps()[-1] >= KILLS // 2, "too few saves came to their end"

    run_processes(2, train_on, tree, timeout=120)
    undisturbed = tree_of(root, tmp_path / "undisturbed", "ep2", STEPS, checkpoint_every=0)
    run_processes(2, train_on, undisturbed, timeout=120)
    assert history(tmp_path / "run") == history(tmp_path / "undisturbed")
    events = read_all_metrics(tmp_path / "run" / "metrics.jsonl")
    assert sum(event.kind == "resume" for event in events) >= KILLS // 2
    assert not any(event.values.get("about") == "checkpoint" for event in events)
