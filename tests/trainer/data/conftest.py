"""A small corpus, and a prepared directory that a test may damage."""

import json
import shutil
from pathlib import Path

import pytest

from shoestring.trainer.data.config import DataConfig
from shoestring.trainer.data.preparation.prepare import prepare_corpus


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    (root / "corpus").mkdir()
    (root / "corpus" / "a.txt").write_text("The time has come, the walrus said, to talk of many things. " * 30)
    (root / "corpus" / "b.txt").write_text("Of shoes and ships and sealing-wax, of cabbages and kings. " * 5)
    config = DataConfig(corpus=str(root / "corpus"), prepared=str(root / "prepared"), vocab_size=290, validation=("b",))
    prepare_corpus(config, lambda line: None, shard_tokens=200)
    return root / "prepared"


@pytest.fixture
def directory(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "copy"))


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "alpha.txt").write_text("The owl and the pussycat went to sea in a beautiful pea-green boat. " * 20)
    records = [{"text": f"Document {n} naïvely spells <|end|> and 🙂.\r\n"} for n in range(5)]
    (corpus / "lines.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (corpus / "held.txt").write_text("They took some honey, and plenty of money, wrapped up in a five-pound note.\n")
    (corpus / "SOURCE.md").write_text("Not a work.")
    return DataConfig(
        corpus=str(corpus), prepared=str(tmp_path / "out" / "prepared"), vocab_size=300, validation=("held",)
    )
