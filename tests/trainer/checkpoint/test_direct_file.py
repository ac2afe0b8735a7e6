"""Files written past the page cache hold what was written, on any file system, and failures have a reason."""

import errno
import fcntl
import os
import random
import resource
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from shoestring.trainer.checkpoint.direct_file import WRITE_BUFFER_BYTES, DirectIOFile
from shoestring.trainer.checkpoint.tensor_file import TensorFileWriter, TensorSpec

RAW = random.Random(0).randbytes(2 * WRITE_BUFFER_BYTES + WRITE_BUFFER_BYTES // 2 + 3)


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture
def limit() -> Iterator[None]:
    """Limit files to one chunk and a part of the next, which ends inside a block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (WRITE_BUFFER_BYTES + 5001, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "size", [0, 1, 4096, WRITE_BUFFER_BYTES - 1, WRITE_BUFFER_BYTES, WRITE_BUFFER_BYTES + 1, len(RAW)]
)
def test_it_holds_what_was_written(tmp_path: Path, size: int) -> None:
    with DirectIOFile(tmp_path / "file") as file:
        file.write(RAW[:size])
    assert (tmp_path / "file").read_bytes() == RAW[:size]


def test_pieces_of_any_length_follow_each_other(tmp_path: Path) -> None:
    lengths, at = random.Random(1), 0
    with DirectIOFile(tmp_path / "file") as file:
        while at < len(RAW):
            end = at + lengths.choice([0, 1, 511, 4096, 100_001, WRITE_BUFFER_BYTES + 7])
            file.write(memoryview(RAW)[at:end])
            at = end
    assert (tmp_path / "file").read_bytes() == RAW


def takes_direct_writes(path: Path) -> bool:
    """Return whether this disk takes direct writes, by the system call alone."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def test_whole_chunks_pass_the_cache_and_the_rest_is_synced(tmp_path: Path) -> None:
    if not takes_direct_writes(tmp_path / "probe"):
        pytest.skip("this file system has no way past the cache")
    before = open_files()
    with patch.object(os, "write", side_effect=os.write) as write, patch.object(os, "fsync") as sync:
        with DirectIOFile(tmp_path / "file") as file:
            file.write(RAW)
            assert file.bypasses_page_cache
            assert [len(call.args[1]) for call in write.call_args_list] == [WRITE_BUFFER_BYTES, WRITE_BUFFER_BYTES]
        assert [len(call.args[1]) for call in write.call_args_list[2:]] == [len(RAW) - 2 * WRITE_BUFFER_BYTES]
    sync.assert_called_once()
    assert open_files() == before


def test_a_file_system_without_a_way_past_the_cache_is_written_plainly(tmp_path: Path) -> None:
    real = fcntl.fcntl

    def refusing(descriptor: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, command, flags)

    with patch.object(fcntl, "fcntl", refusing), DirectIOFile(tmp_path / "file") as file:
        assert not file.bypasses_page_cache
        file.write(RAW)
    assert (tmp_path / "file").read_bytes() == RAW


def test_a_file_system_that_takes_larger_blocks_is_written_plainly(tmp_path: Path) -> None:
    real = os.write

    def picky(descriptor: int, raw: memoryview) -> int:
        if file.bypasses_page_cache:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, raw)

    with patch.object(os, "write", picky), DirectIOFile(tmp_path / "file") as file:
        file.write(RAW)
    assert (tmp_path / "file").read_bytes() == RAW


def test_an_error_that_is_no_matter_of_blocks_is_raised_immediately(tmp_path: Path) -> None:
    before = open_files()
    with (
        patch.object(os, "write", side_effect=OSError(errno.EIO, "Input/output error")) as write,
        pytest.raises(OSError, match="Input/output error"),
        DirectIOFile(tmp_path / "file") as file,
    ):
        file.write(RAW)
    write.assert_called_once()
    assert open_files() == before


def test_nothing_stays_open_when_the_disk_is_full_at_the_header(tmp_path: Path) -> None:
    """The header is large if there are many tensors."""
    before, many = open_files(), [TensorSpec(f"tensor {number}", torch.uint8, (0,)) for number in range(100_000)]
    full = OSError(errno.ENOSPC, "No space left on device")
    with patch.object(DirectIOFile, "write", side_effect=full), pytest.raises(OSError, match="No space"):
        TensorFileWriter(tmp_path / "file", many).__enter__()
    assert open_files() == before


@pytest.mark.usefixtures("limit")
def test_a_disk_without_room_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File too large"), DirectIOFile(tmp_path / "file") as file:
        file.write(RAW)
    assert (tmp_path / "file").read_bytes() == RAW[: WRITE_BUFFER_BYTES + 5001]


def test_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        DirectIOFile(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
