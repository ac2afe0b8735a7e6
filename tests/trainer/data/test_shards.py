"""Shards: written in parts, read as one sequence, refused when changed."""

from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from shoestring.tests.trainer.data.small_data import refusal, shard, split_in_memory
from shoestring.trainer.data.prepared import open_prepared_directory, verify_prepared_data
from shoestring.trainer.data.shards import SplitPartWriter, read_document_starts


def test_truncated_and_missing_shards_are_refused_together(directory: Path) -> None:
    cut = shard(directory, "train", 1)
    cut.write_bytes(cut.read_bytes()[:-2])
    gone = shard(directory, "validation")
    gone.unlink()
    message = refusal(open_prepared_directory, directory)
    assert f"{cut.name} = 398: must have 400 bytes" in message
    assert f"{gone.name} = None: is missing" in message
    message = refusal(verify_prepared_data, directory)
    assert cut.name in message
    assert gone.name in message


@pytest.mark.parametrize("starts", [[5], [0, 3], []])
def test_damaged_document_starts_are_refused(directory: Path, starts: list[int]) -> None:
    (path,) = directory.glob("*.train.documents")
    path.write_bytes(np.array(starts, dtype="<i8").tobytes())
    parts = open_prepared_directory(directory).parts

    def read(folder: Path) -> None:
        list(read_document_starts(folder, parts, "train"))

    assert path.name in refusal(read, directory)


def test_tokens_of_a_large_vocabulary_are_written_wide(tmp_path: Path) -> None:
    with closing(SplitPartWriter(tmp_path, "train", np.dtype("<u4"), 2)) as writer:
        writer.add_documents([np.array([1, 2**16, 129_279])], 3)
        writer.add_documents([], 0)
        part = writer.finish()
    assert part is not None
    assert [entry.bytes for entry in part.shards] == [8, 4]
    stored = b"".join((tmp_path / entry.file).read_bytes() for entry in part.shards)
    assert np.frombuffer(stored, dtype="<u4").tolist() == [1, 2**16, 129_279]
    assert (tmp_path / part.starts.file).read_bytes() == bytes(8)


def test_a_part_without_documents_is_none(tmp_path: Path) -> None:
    with closing(SplitPartWriter(tmp_path, "train", np.dtype("<u4"), 2)) as writer:
        assert writer.finish() is None


def test_any_range_across_shards_of_unequal_length_is_read() -> None:
    tokens_T = np.arange(40, dtype=np.uint16)
    cuts = [0, 1, 2, 19, 20, 33, 40]
    split = split_in_memory("train", [tokens_T[a:b] for a, b in pairwise(cuts)])
    for start in range(41):
        for stop in range(start, 41):
            assert split.read_tokens(start, stop).tolist() == list(range(start, stop))
    with pytest.raises(IndexError, match="tokens 3 to 41 of 40"):
        split.read_tokens(3, 41)
