"""Lists, verification and differences of checkpoints."""

from pathlib import Path

import pytest

from shoestring.tests.launch.small_checkpoint import model
from shoestring.tests.trainer.checkpoint.saved import save_model
from shoestring.trainer.checkpoint.inspect import diff_checkpoints, list_checkpoints, verify_checkpoint


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step, seed in ((2, 1), (4, 1), (6, 2)):
        save_model(model(seed), tmp_path / "checkpoints", step)
    return tmp_path


def test_a_list_and_a_verification_count_the_same(run_dir: Path) -> None:
    listed = list_checkpoints(run_dir)
    assert [(each.step, each.state) for each in listed] == [(step, "complete") for step in (2, 4, 6)]
    found = verify_checkpoint(run_dir, 4)
    assert (found.tensors, found.bytes, found.damage) == (listed[1].tensors, listed[1].bytes, [])
    (run_dir / "checkpoints" / "step_00000004" / "complete").unlink()
    assert [each.state for each in list_checkpoints(run_dir)] == ["complete", "damaged", "complete"]
    assert verify_checkpoint(run_dir, 4).damage


def test_checkpoints_of_the_same_weights_are_equal(run_dir: Path) -> None:
    metadata, (weights,) = diff_checkpoints(run_dir, run_dir, (2, 4))
    assert metadata == ["step: 2 | 4"]
    assert (weights.kind, weights.equal, weights.largest, weights.is_equal) == ("model", weights.tensors, 0.0, True)
    _, (weights,) = diff_checkpoints(run_dir, run_dir, (4, 6))
    assert weights.largest > 0
    assert not weights.is_equal
