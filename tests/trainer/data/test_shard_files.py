"""Shards: few open together, hashed when first read, and again after a change."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from shoestring.trainer.data import shard_files
from shoestring.trainer.data.manifest import FileEntry
from shoestring.trainer.data.shard_files import DataChanged, ShardFileReader
from shoestring.trainer.data.verified_files import read_file_signature

DTYPE = np.dtype("<u2")


def write(directory: Path, count: int) -> list[FileEntry]:
    entries = []
    for number in range(count):
        raw = np.arange(10 * number, 10 * number + 10, dtype=DTYPE).tobytes()
        (directory / f"{number}.bin").write_bytes(raw)
        entries.append(FileEntry(f"{number}.bin", len(raw), hashlib.sha256(raw).hexdigest()))
    return entries


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_few_are_open_at_a_time_and_none_is_left(tmp_path: Path) -> None:
    before = open_files()
    shards = ShardFileReader(tmp_path, write(tmp_path, 40), [DTYPE] * 40, {}, most_open=3)
    assert open_files() == before
    for number in (*range(40), *range(40)):
        assert shards.read_tokens(number, 2, 3).tolist() == [10 * number + 2, 10 * number + 3, 10 * number + 4]
        assert open_files() <= before + 3
    del shards
    assert open_files() == before


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\xff")


def flip_and_set_the_time_back(path: Path) -> None:
    status = path.stat()
    flip(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(bytes(20))
    other.replace(path)


@pytest.mark.parametrize(
    "harm",
    [
        flip,
        flip_and_set_the_time_back,
        lambda path: os.truncate(path, 4),
        lambda path: os.truncate(path, 40),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(bytes(20)),
    ],
)
@pytest.mark.parametrize("is_read_before", [True, False])
def test_a_file_that_changes_is_noticed(tmp_path: Path, harm: Callable[[Path], None], is_read_before: bool) -> None:
    shards = ShardFileReader(tmp_path, write(tmp_path, 2), [DTYPE] * 2, {})
    if is_read_before:
        shards.read_tokens(1, 0, 10)
    harm(tmp_path / "1.bin")
    with pytest.raises(DataChanged, match=r"1\.bin has changed since it was prepared"):
        shards.read_tokens(1, 0, 10)
    assert shards.read_tokens(0, 0, 1).tolist() == [0]


@pytest.mark.parametrize("harm", [replace, Path.unlink])
def test_a_file_of_another_name_by_now_is_read_on_or_named(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    shards = ShardFileReader(tmp_path, write(tmp_path, 2), [DTYPE] * 2, {}, most_open=1)
    shards.read_tokens(1, 0, 10)
    harm(tmp_path / "1.bin")
    assert shards.read_tokens(1, 0, 1).tolist() == [10]  # it is open with the old content
    shards.read_tokens(0, 0, 1)
    with pytest.raises(DataChanged, match=r"1\.bin"):
        shards.read_tokens(1, 0, 1)


def test_a_file_that_was_only_touched_is_read_again_and_used(tmp_path: Path) -> None:
    shards = ShardFileReader(tmp_path, write(tmp_path, 1), [DTYPE] * 1, {})
    shards.read_tokens(0, 0, 1)
    os.utime(tmp_path / "0.bin", ns=(0, 0))
    with patch.object(shard_files, "_sha256", wraps=shard_files._sha256) as hashed:
        for _ in range(3):
            assert shards.read_tokens(0, 0, 1).tolist() == [0]
    assert hashed.call_count == 1


def test_a_stamp_saves_the_first_reading_and_no_later_one(tmp_path: Path) -> None:
    entries = write(tmp_path, 2)
    stamp = {entry.file: read_file_signature(tmp_path, entry) for entry in entries}
    shards = ShardFileReader(tmp_path, entries, [DTYPE] * len(entries), stamp)
    flip(tmp_path / "1.bin")
    with patch.object(shard_files, "_sha256", wraps=shard_files._sha256) as hashed:
        assert shards.read_tokens(0, 0, 1).tolist() == [0]
        assert hashed.call_count == 0
    with pytest.raises(DataChanged):
        shards.read_tokens(1, 0, 1)
