"""The configurations with which a run may continue from a checkpoint."""

from pathlib import Path

import pytest
import torch

from shoestring.tests.trainer.resumed_loop import run
from shoestring.tests.trainer.small_loop import prepared_root
from shoestring.trainer.checkpoint.compatibility import compute_dtype_problems
from shoestring.trainer.checkpoint.store import CheckpointStore


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_root(tmp_path_factory.mktemp("resume"), words=4000)


def test_auto_is_refused_where_it_means_other_numbers(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "run", "alone", 2)
    facts = CheckpointStore(tmp_path / "run" / "checkpoints", keep_last=2).open(2).manifest.metadata
    assert list(compute_dtype_problems(facts, torch.float32)) == []
    (problem,) = compute_dtype_problems(facts, torch.bfloat16)
    assert "means bfloat16 on this device, and the checkpoint of step 2 was computed in float32" in str(problem)
