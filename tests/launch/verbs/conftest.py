"""Fixtures of this folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from shoestring.launch.cli import main
from shoestring.tests.launch.small_checkpoint import SHAPE, TEXT
from shoestring.tests.trainer.checkpoint.saved import save_model
from shoestring.trainer.data.tokenizer import train_tokenizer
from shoestring.trainer.model.init import initialize_weights
from shoestring.trainer.model.model import Model


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint, `run`, and its export, `hf`."""
    root = tmp_path_factory.mktemp("others")
    model = Model(SHAPE)
    initialize_weights(model, 1)
    attachments = {"tokenizer.json": train_tokenizer([TEXT], 300).to_json().encode()}
    save_model(model, root / "run" / "checkpoints", 4, attachments)
    with pytest.raises(SystemExit):
        main(["export", str(root / "run"), str(root / "hf"), "--dtype", "fp32"])
    return root


@pytest.fixture
def hf(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original / "hf", tmp_path / "hf"))


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original / "run", tmp_path / "run"))
