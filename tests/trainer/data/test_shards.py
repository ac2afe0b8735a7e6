"""Changed shards are refused."""

from pathlib import Path

import numpy as np

from shoestring.tests.trainer.data.small_data import refusal
from shoestring.trainer.data.prepared import open_prepared_directory, verify_prepared_data


def test_truncated_and_missing_shards_are_refused_together(directory: Path) -> None:
    shard = directory / "train_00001.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    (directory / "validation_00000.bin").unlink()
    for act in (open_prepared_directory, verify_prepared_data):
        message = refusal(act, directory)
        assert "train_00001.bin = 398: must have 400 bytes" in message
        assert "validation_00000.bin = None: is missing" in message


def test_damaged_document_starts_are_refused(directory: Path) -> None:
    path = directory / "train_documents.npy"
    size = path.stat().st_size
    path.write_bytes(b"x" * size)
    assert "is not an .npy file" in refusal(open_prepared_directory, directory)
    np.save(path, np.array([5], dtype=np.int64))
    assert path.stat().st_size == size
    assert "rising document starts" in refusal(open_prepared_directory, directory)
