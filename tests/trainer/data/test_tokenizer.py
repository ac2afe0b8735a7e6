"""A tokenizer that does not belong to the shards is refused."""

import hashlib
from pathlib import Path

import pytest

from shoestring.tests.trainer.data.small_data import edit_manifest, refusal
from shoestring.trainer.data.prepared import open_prepared_directory


def test_another_tokenizer_is_refused(directory: Path) -> None:
    path = directory / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    assert "tokenizer.json" in (message := refusal(open_prepared_directory, directory))
    assert "is not the tokenizer of these shards" in message
    path.unlink()
    assert "tokenizer.json = None: is missing" in refusal(open_prepared_directory, directory)


@pytest.mark.parametrize("text", ["{}", "no json", '{"version": "1.0", "model": {"type": "WordLevel"}}'])
def test_a_file_that_is_no_tokenizer_of_ours_is_refused(directory: Path, text: str) -> None:
    (directory / "tokenizer.json").write_text(text)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    edit_manifest(directory, lambda tree: tree["tokenizer"].update(sha256=sha256))
    assert "is not a Shoestring tokenizer" in refusal(open_prepared_directory, directory)
