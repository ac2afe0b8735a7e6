"""A resumed run, on any layout, despite damaged checkpoints and failed saves."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from shoestring import __version__
from shoestring.comm.errors import ConfigError
from shoestring.tests.launch.small_checkpoint import flip_bit
from shoestring.tests.processes import RanksFailed, World, run_processes
from shoestring.tests.trainer.resumed_loop import (
    Share,
    digests,
    groups_of,
    losses,
    run,
    share_of,
    train_on,
    tree_of,
    whole,
)
from shoestring.tests.trainer.small_loop import LENGTH, prepared_root
from shoestring.trainer.build import build_rank_resources
from shoestring.trainer.checkpoint import checkpoint, saver
from shoestring.trainer.checkpoint.store import CheckpointStore
from shoestring.trainer.checkpoint.tensor_file import read_tensor_at
from shoestring.trainer.config import RunConfig
from shoestring.trainer.run.checkpointing import load_latest_checkpoint
from shoestring.trainer.run.exit import RunFailed
from shoestring.trainer.run.null_reporter import NullReporter
from shoestring.trainer.structured_config import build_dataclass
from shoestring.trainer.telemetry.history import read_metrics


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_root(tmp_path_factory.mktemp("resume"), words=4000)


@pytest.mark.parametrize("precision", ["FP8", "FP64"])
def test_a_run_in_other_precisions_resumes_to_the_last_bit(precision: str, root: Path, tmp_path: Path) -> None:
    layout = f"ep2 in {precision}"
    undisturbed = run(root, tmp_path / "undisturbed", layout, 4)
    run(root, tmp_path / "run", layout, 2)
    assert run(root, tmp_path / "run", layout, 4) == undisturbed
    assert losses(tmp_path / "run") == losses(tmp_path / "undisturbed")


def started_on(world: World, tree: dict[str, Any]) -> Share:
    """Return the state that a new run begins with."""
    config = build_dataclass(RunConfig, tree)
    rank = build_rank_resources(config, groups_of(world, config), torch.device("cpu"))
    assert load_latest_checkpoint(rank, NullReporter()) is None
    rank.close()
    return share_of(rank.local_checkpoint_pieces())


def test_a_new_run_begins_with_the_weights_of_another(root: Path, tmp_path: Path) -> None:
    state = run(root, tmp_path / "first", "alone", 2)
    tree = tree_of(root, tmp_path / "second", "ep2", 2, start_from=str(tmp_path / "first"), seed=5)
    found = run_processes(2, started_on, tree)
    assert not any(tensor.any() for name, tensor in whole(found).items() if name.startswith("exp_avg"))
    began = digests(found)
    for name, digest in began.items():
        kind, _, parameter = name.partition("/")
        if kind in ("model", "average"):
            assert digest == state[f"model/{parameter}"], name
    assert began.keys() == state.keys()
    run_processes(2, train_on, tree)
    events = read_metrics(tmp_path / "second" / "metrics.jsonl")
    (start,) = (event.values["checkpoint"] for event in events if event.kind == "start")
    assert start == str(tmp_path / "first" / "checkpoints" / "step_00000002")
    other = tree | {"model": tree["model"] | {"num_attention_heads": 2}}
    other["training"] = tree["training"] | {"run_dir": str(tmp_path / "third")}
    with pytest.raises(
        RanksFailed, match=r"model.num_attention_heads = 2: the checkpoint of training.start_from has 4"
    ):
        run_processes(2, train_on, other)


GROWING = {
    "global_batch_size": 16,
    "rampup_start_batch_size": 8,
    "rampup_batch_size_increment": 4,
    "rampup_tokens": 32 * LENGTH,
}
"""Steps of 8, 8, 12, 12, 16 and 16 sequences, and so on."""


def test_a_run_resumes_in_the_middle_of_a_batch_ramp(root: Path, tmp_path: Path) -> None:
    whole_run = GROWING | {"tokens": 72 * LENGTH}
    first, again = tmp_path / "first", tmp_path / "again"
    run(root, first, "pp2 mirrored", 0, **GROWING, tokens=28 * LENGTH)
    store = CheckpointStore(first / "checkpoints", keep_last=2)
    assert store.steps() == [3]
    assert store.open(3).manifest.metadata["consumed_samples"] == 28
    assert store.open(3).manifest.metadata["version"] == __version__
    undisturbed = run(root, tmp_path / "undisturbed", "pp2 mirrored", 0, **whole_run, checkpoint_every=3)
    shutil.copytree(first, again)
    assert run(root, again, "pp2 mirrored", 0, **whole_run) == undisturbed  # to the last bit
    assert losses(again) == losses(tmp_path / "undisturbed")
    assert len(losses(again)) == 6
    run(root, first, "alone", 0, **whole_run)
    assert losses(first) == pytest.approx(losses(again), rel=1e-5)
    with pytest.raises(RanksFailed, match=r"training.rampup_batch_size_increment = 8: the checkpoint of step 6 has 4"):
        run(root, again, "pp2 mirrored", 0, **(whole_run | {"rampup_batch_size_increment": 8, "tokens": 104 * LENGTH}))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "run", "alone", 4, checkpoint_every=2, seed=0)
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep_last=2)
    assert store.steps() == [2, 4]
    expected = losses(tmp_path / "run")
    flip_bit(next(store.checkpoint_path(4).glob("part_*.safetensors")))
    run(root, tmp_path / "run", "ep2", 5, checkpoint_every=2, seed=0)
    events = read_metrics(tmp_path / "run" / "metrics.jsonl")
    (warning,) = (str(event.values["message"]) for event in events if event.values.get("about") == "checkpoint")
    assert "the checkpoint of step 4 is damaged and was renamed to step_00000004.damaged" in warning
    assert "SHA-256" in warning
    assert warning.endswith("the run resumes from step 2")
    assert losses(tmp_path / "run")[:4] == pytest.approx(expected, rel=1e-8)
    assert store.steps() == [4, 5]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "run", "alone", 2)
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep_last=2)
    flip_bit(next(store.checkpoint_path(2).glob("part_*.safetensors")))
    for _ in range(2):
        with pytest.raises(RanksFailed, match="no other checkpoint is left") as failed:
            run(root, tmp_path / "run", "alone", 3)
        assert ConfigError.__name__ in str(failed.value)
    assert store.steps() == [2]


def train_where_files_cannot_be_opened(world: World, tree: dict[str, Any]) -> str:
    """The last rank, for example, has too many files open."""
    real = read_tensor_at

    def read(path: Path, *what: Any) -> Tensor:
        if world.rank == world.size - 1:
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return real(path, *what)

    with patch.object(checkpoint, "read_tensor_at", read), pytest.raises(RunFailed) as failed:
        train_on(world, tree)
    return str(failed.value)


def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "run", "alone", 4, checkpoint_every=2)
    messages = run_processes(2, train_where_files_cannot_be_opened, tree_of(root, tmp_path / "run", "ep2", 5))
    assert all("Too many open files" in message and "nothing was changed" in message for message in messages)
    assert CheckpointStore(tmp_path / "run" / "checkpoints", keep_last=2).steps() == [2, 4]
    run(root, tmp_path / "run", "ep2", 5)
    assert len(losses(tmp_path / "run")) == 5


@contextmanager
def full_disk(steps: tuple[int, ...]) -> Iterator[None]:
    """Fill the disk of the last rank while these steps are saved."""
    real = saver.write_rank_file

    def write(directory: Path, name: str, pieces: Any) -> None:
        if int(directory.name[5:13]) in steps:
            raise OSError(errno.ENOSPC, "No space left on device", str(directory))
        real(directory, name, pieces)

    with patch.object(saver, "write_rank_file", write):
        yield


def train_on_a_full_disk(world: World, tree: dict[str, Any], steps: tuple[int, ...]) -> str | None:
    with full_disk(steps if world.rank == world.size - 1 else ()):
        try:
            train_on(world, tree)
        except RunFailed as failed:
            return str(failed)
    return None


def test_a_disk_that_is_full_is_reported_and_training_continues(root: Path, tmp_path: Path) -> None:
    tree = tree_of(root, tmp_path / "run", "ep2", 6, checkpoint_every=2)
    assert run_processes(2, train_on_a_full_disk, tree, (4,)) == [None] * 2
    events = read_metrics(tmp_path / "run" / "metrics.jsonl")
    (warning,) = (str(event.values["message"]) for event in events if event.values.get("about") == "checkpoint")
    assert "the checkpoint of step 4 could not be written: rank 1: [Errno 28] No space left on device" in warning
    assert [event.step for event in events if event.kind == "checkpoint"] == [2, 6]
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step_00000002", "step_00000006"}


def test_a_run_whose_last_checkpoint_cannot_be_written_has_failed(root: Path, tmp_path: Path) -> None:
    tree = tree_of(root, tmp_path / "run", "ep2", 3, checkpoint_every=2)
    messages = run_processes(2, train_on_a_full_disk, tree, (3,))
    assert all(
        message is not None and "the last checkpoint, of step 3, could not be" in message for message in messages
    )
    assert CheckpointStore(tmp_path / "run" / "checkpoints", 2).steps() == [2]
