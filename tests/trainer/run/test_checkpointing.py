"""The state that a run's checkpoint restores, and the memory that its saves reserve."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from shoestring.tests.processes import World, run_processes
from shoestring.tests.trainer.small_loop import BATCH, LENGTH, run_config, run_rank
from shoestring.trainer.checkpoint.pieces import TensorPiece
from shoestring.trainer.checkpoint.saver import CheckpointSaver, SaveResult
from shoestring.trainer.checkpoint.store import CheckpointExtras
from shoestring.trainer.config import RunConfig
from shoestring.trainer.loop import _insist
from shoestring.trainer.memory.forecast import MemoryPredictor
from shoestring.trainer.run.exit import RunFailed
from shoestring.trainer.structured_config import build_dataclass
from shoestring.trainer.telemetry.history import read_metrics


def reserved_bytes(world: World, tree: dict[str, Any]) -> list[tuple[str, int]]:
    """Return the bytes that a run reserves, and the bytes that its saves copy, in that order."""
    found, reserve, begin = list[tuple[str, int]](), CheckpointSaver.reserve_memory, CheckpointSaver.begin_save

    def noted_reserve(self: CheckpointSaver, pieces: list[TensorPiece]) -> None:
        found.append(("reserve", sum(piece.nbytes for piece in pieces)))
        reserve(self, pieces)

    def noted_begin(self: CheckpointSaver, step: int, pieces: list[TensorPiece], cover: CheckpointExtras) -> None:
        found.append(("begin", sum(piece.nbytes for piece in pieces)))
        begin(self, step, pieces, cover)

    with (
        patch.object(CheckpointSaver, "reserve_memory", noted_reserve),
        patch.object(CheckpointSaver, "begin_save", noted_begin),
    ):
        run_rank(world, tree)
    return found


def test_memory_for_saves_is_reserved_once_before_the_first_step(root: Path) -> None:
    tree = run_config(root)
    tree["training"] = tree["training"] | {"run_dir": str(root / "reserved")}
    (found,) = run_processes(1, reserved_bytes, tree)
    (first, size), *saves = found
    assert first == "reserve"
    assert saves
    assert all(save == ("begin", size) for save in saves)
    predicted = MemoryPredictor(build_dataclass(RunConfig, tree), torch.device("cpu")).predict_host(0).copy_for_saves
    random = len(torch.get_rng_state())  # a generator's state is not counted
    assert predicted == pytest.approx(size - random, rel=0.01)
    assert run_processes(1, reserved_bytes, tree) == [[]]  # a finished run


def resumed_random_state(world: World, tree: dict[str, Any]) -> bool:
    """Train with one generator state, resume with another; return whether the first one is restored."""
    torch.manual_seed(123)
    before = torch.get_rng_state()
    run_rank(world, tree)
    torch.manual_seed(5)
    run_rank(world, tree)
    return torch.equal(torch.get_rng_state(), before)


def test_the_random_state_comes_back_with_the_checkpoint(root: Path) -> None:
    tree = run_config(root)
    tree["training"] = tree["training"] | {"run_dir": str(root / "random")}
    assert run_processes(1, resumed_random_state, tree) == [True]


def test_shards_of_masters_moments_and_average_come_back_with_the_checkpoint(root: Path) -> None:
    """Two ranks with replicas, weights in BF16: six steps, and twice three steps."""

    def run(name: str, steps: int) -> list[dict[str, Any]]:
        tree = run_config(root) | {"topology": {"edp": 2}, "precision": {"compute": "bfloat16"}}
        tree["optimizer"] = tree["optimizer"] | {"ema_decay": 0.5}
        tokens = {"tokens": steps * LENGTH * BATCH, "run_dir": str(root / name), "evaluate_every": 2}
        tree["training"] = tree["training"] | tokens
        run_processes(2, run_rank, tree)
        kinds, path = ("step", "evaluation", "sample"), root / name / "metrics.jsonl"
        exact = ("loss", "loss/mtp", "grad_norm", "loss/averaged", "text")
        events = [event for event in read_metrics(path) if event.kind in kinds and event.step > 3]
        return [{key: event.values[key] for key in exact if key in event.values} for event in events]

    undisturbed = run("six", 6)
    assert run("three and three", 3) == []
    assert run("three and three", 6) == undisturbed
    evaluation = next(values for values in undisturbed if "loss/averaged" in values)
    assert evaluation["loss/averaged"] != evaluation["loss"]


def test_a_last_checkpoint_that_failed_names_the_one_to_resume_from(tmp_path: Path) -> None:
    last = SaveResult(4, tmp_path / "step_00000004", "no room")
    with pytest.raises(RunFailed, match=r"of step 4, .*: no room; make room; .* starts from the beginning"):
        _insist(last)
    (tmp_path / "step_00000002").mkdir()
    with pytest.raises(RunFailed, match="continues from step 2"):
        _insist(last)
