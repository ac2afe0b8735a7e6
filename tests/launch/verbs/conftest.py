"""Fixtures: runs with checkpoints of a small model, and an export of one, that a test may change."""

import shutil
from pathlib import Path

import pytest

from shoestring.tests.launch.command_line import exit_code
from shoestring.tests.launch.small_checkpoint import TEXT, model
from shoestring.tests.trainer.checkpoint.saved import save_model
from shoestring.trainer.data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT], 300)


@pytest.fixture(scope="session")
def original(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a run of one checkpoint, `run`, and its export, `hf`."""
    root = tmp_path_factory.mktemp("others")
    save_model(model(1), root / "run" / "checkpoints", 4, {"tokenizer.json": tokenizer.raw})
    assert exit_code("export", root / "run", root / "hf", "--dtype", "fp32") == 0
    return root


@pytest.fixture
def hf(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original / "hf", tmp_path / "hf"))


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original / "run", tmp_path / "run"))


@pytest.fixture(scope="session")
def saved_twice(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with checkpoints of steps 2 and 4."""
    run = tmp_path_factory.mktemp("run")
    attachments = {"tokenizer.json": tokenizer.raw}
    for step in (2, 4):
        save_model(model(step), run / "checkpoints", step, attachments)
    return run


@pytest.fixture
def saves(saved_twice: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_twice, tmp_path / "run"))
