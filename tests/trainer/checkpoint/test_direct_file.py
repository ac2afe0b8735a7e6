"""Files that are written past the page cache hold what was written, on any file system, and say why they cannot."""

from __future__ import annotations

import errno
import os
import random
import resource
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from shoestring.trainer.checkpoint.direct_file import DirectFile

CHUNK = 4 * 2**20
RAW = random.Random(0).randbytes(2 * CHUNK + CHUNK // 2 + 3)


@pytest.fixture
def limit() -> Iterator[None]:
    """The kernel refuses what is beyond a chunk and a part of one, which ends inside of a block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK + 5001, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 1, 4096, CHUNK - 1, CHUNK, CHUNK + 1, len(RAW)])
def test_it_holds_what_was_written(tmp_path: Path, size: int) -> None:
    with DirectFile(tmp_path / "file") as file:
        file.write(RAW[:size])
    assert (tmp_path / "file").read_bytes() == RAW[:size]


@pytest.mark.parametrize("shared_memory", [False, True])
def test_pieces_of_any_length_follow_each_other(tmp_path: Path, shared_memory: bool) -> None:
    path = Path("/dev/shm", f"shoestring_{os.getpid()}") if shared_memory else tmp_path / "file"
    lengths, at = random.Random(1), 0
    try:
        with DirectFile(path) as file:
            while at < len(RAW):
                end = at + lengths.choice([0, 1, 511, 4096, 100_001, CHUNK + 7])
                file.write(memoryview(RAW)[at:end])
                at = end
        assert path.read_bytes() == RAW
    finally:
        path.unlink()


def test_whole_chunks_pass_the_cache(tmp_path: Path) -> None:
    """Where this disk takes them so: a disk that refuses is no failure."""
    written = []
    with DirectFile(tmp_path / "file") as file, patch.object(os, "write", side_effect=os.write) as write:
        if not file.is_past_the_cache:
            pytest.skip("this file system has no way past the cache")
        file.write(RAW)
        written = [len(call.args[1]) for call in write.call_args_list]
        assert file.is_past_the_cache
    assert written == [CHUNK, CHUNK]


def test_a_file_system_that_takes_larger_blocks_is_written_plainly(tmp_path: Path) -> None:
    real = os.write

    def picky(descriptor: int, raw: memoryview) -> int:
        if file.is_past_the_cache:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, raw)

    with patch.object(os, "write", picky), DirectFile(tmp_path / "file") as file:
        file.write(RAW)
    assert (tmp_path / "file").read_bytes() == RAW


@pytest.mark.usefixtures("limit")
def test_a_disk_without_room_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File too large"), DirectFile(tmp_path / "file") as file:
        file.write(RAW)
    assert (tmp_path / "file").read_bytes() == RAW[: CHUNK + 5001]


def test_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        DirectFile(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
