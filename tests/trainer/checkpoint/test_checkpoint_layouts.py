"""A checkpoint of one layout is read on any other, to the last bit."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.tests.processes import World, run_processes
from shoestring.tests.trainer.resumed_loop import (
    LAYOUTS,
    PRECISIONS,
    Share,
    State,
    digests,
    groups_of,
    losses,
    run,
    share_of,
    tree_of,
    whole,
)
from shoestring.tests.trainer.small_loop import prepared_root
from shoestring.trainer.build import build_rank_resources
from shoestring.trainer.checkpoint.store import CheckpointStore
from shoestring.trainer.checkpoint.training_state import model_pieces
from shoestring.trainer.config import RunConfig
from shoestring.trainer.run.checkpointing import load_latest_checkpoint
from shoestring.trainer.run.null_reporter import NullReporter
from shoestring.trainer.structured_config import build_dataclass

BEFORE, AFTER = 3, 10
SLOW = ("ep4", "pp4", "alone", "pp2 ep2 edp2", "pp2 mirrored")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_root(tmp_path_factory.mktemp("resume"), words=4000)


def loaded_on(world: World, tree: dict[str, Any]) -> tuple[Share, Share]:
    """Return the state that this rank finds in the run's last checkpoint, and its weights."""
    config = build_dataclass(RunConfig, tree)
    rank = build_rank_resources(config, groups_of(world, config), torch.device("cpu"))
    assert load_latest_checkpoint(rank, NullReporter()) is not None
    rank.close()
    return share_of(rank.local_checkpoint_pieces()), share_of(model_pieces(rank.engine.stepper.model))


def loaded(root: Path, directory: Path, layout: str) -> State:
    size = LAYOUTS[layout][0].world_size
    found = run_processes(size, loaded_on, tree_of(root, directory, layout, BEFORE), timeout=120)
    run_state = [share for share, _ in found]
    masters = whole(run_state)
    for name, weight in whole([share for _, share in found]).items():
        assert torch.equal(masters[name].to(weight.dtype), weight), name
    return digests(run_state)


@pytest.fixture(scope="module")
def began(root: Path) -> tuple[Path, State, list[float]]:
    """Return a run on (pp2 ep2) up to its first checkpoint, its state there, and the losses that follow undisturbed."""
    run_state = run(root, root / "began", "pp2 ep2", BEFORE)
    undisturbed = run(root, root / "undisturbed", "pp2 ep2", BEFORE + AFTER, checkpoint_every=BEFORE)
    again = root / "again"
    shutil.copytree(root / "began", again)
    assert run(root, again, "pp2 ep2", BEFORE + AFTER) == undisturbed  # to the last bit
    assert losses(again) == losses(root / "undisturbed")
    return root / "began", run_state, losses(again)


COMES_BACK = [("pp2 mirrored", "alone"), *((f"ep2 in {each}", f"pp2 in {each}") for each in PRECISIONS)]


@pytest.mark.parametrize(("first", "second"), COMES_BACK)
def test_weights_moments_and_biases_come_back_to_the_bit(first: str, second: str, root: Path, tmp_path: Path) -> None:
    run_state = run(root, tmp_path / "run", first, 2)
    assert {name.partition("/")[0] for name in run_state} == {"model", "exp_avg", "exp_avg_sq", "average"}
    assert loaded(root, tmp_path / "run", second) == run_state
    checkpoint = CheckpointStore(tmp_path / "run" / "checkpoints", keep_last=2).open(2)
    assert checkpoint.manifest.tensors.keys() - run_state.keys() == {
        f"rng/rank_{rank:05d}" for rank in range(LAYOUTS[first][0].world_size)
    }
    tokenizer = hashlib.sha256(checkpoint.read_attachment("tokenizer.json")).hexdigest()
    assert tokenizer == checkpoint.manifest.metadata["tokenizer"]
    assert run(root, tmp_path / "run", second, 3).keys() == run_state.keys()
    assert loaded(root, tmp_path / "run", first).keys() == run_state.keys()


@pytest.mark.slow
@pytest.mark.parametrize("layout", SLOW)
def test_a_run_resumes_on_another_layout_and_back(
    layout: str, root: Path, began: tuple[Path, State, list[float]], tmp_path: Path
) -> None:
    directory, run_state, expected = began
    shutil.copytree(directory, tmp_path / "run")
    assert loaded(root, tmp_path / "run", layout) == run_state
    there = run(root, tmp_path / "run", layout, BEFORE + AFTER)
    assert there.keys() == run_state.keys()
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-6)
    assert loaded(root, tmp_path / "run", "pp2 ep2") == there
