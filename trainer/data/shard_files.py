"""Reader of shard files: few are open at a time, and each is checked against its hash before use.

A corpus of 280 GB has 1,049 shards, and a process may open 1,024 files. A memory map would keep its file open, and a
truncated file would kill the process by a signal; so ranges are read, which is ten microseconds slower.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .manifest import FileEntry
from .verified_files import file_signature

MAX_OPEN_FILES = 64
"""Most files of one split that are open at a time."""
_CHUNK_BYTES = 2**22


class DataChanged(Exception):  # noqa: N818 -- says what happened
    """Error for a shard that was damaged or replaced while a run was reading it."""


def _file_times(status: os.stat_result) -> tuple[int, int, int]:
    """Return file size and times, which any write changes. A user can set back mtime, but not ctime."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


class ShardFileReader:
    """Reader of the shards of one split in `directory`; not thread-safe.

    The SHA-256 of a shard is checked at its first read, unless `verified` lists its current signature, and again
    whenever its size or times change: a read that returns has read the prepared tokens.
    """

    def __init__(
        self,
        directory: Path,
        entries: Sequence[FileEntry],
        dtypes: Sequence[np.dtype[Any]],
        verified: Mapping[str, object],
        most_open: int = MAX_OPEN_FILES,
    ) -> None:
        self._directory = directory
        self._entries = entries
        self._dtypes = dtypes
        self._verified = verified
        self._most_open = most_open
        self._open: OrderedDict[int, int] = OrderedDict()
        self._checked: dict[int, tuple[int, int, int]] = {}

    def __del__(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def read_tokens(self, number: int, first: int, count: int) -> npt.NDArray[Any]:
        """Return tokens `first` to `first + count` (excluded) of shard `number`. Raises `DataChanged`."""
        path, dtype = self._path(number), self._dtypes[number]
        size = dtype.itemsize
        try:
            descriptor = self._descriptor(number)
            self._check(number, descriptor)
            raw = os.pread(descriptor, count * size, first * size)
            while self._checked[number] != _file_times(os.fstat(descriptor)):  # written to during the read
                self._check(number, descriptor)
                raw = os.pread(descriptor, count * size, first * size)
        except OSError as error:
            raise DataChanged(
                f"{path} cannot be read: {error.strerror}; when it can be read again, the same command resumes"
            ) from error
        return np.frombuffer(raw, dtype)

    def _path(self, number: int) -> Path:
        return self._directory / self._entries[number].file

    def _descriptor(self, number: int) -> int:
        """Return the shard's file descriptor; close the least recently used files beyond the limit."""
        if number not in self._open:
            while len(self._open) >= self._most_open:
                os.close(self._open.popitem(last=False)[1])
            self._open[number] = os.open(self._path(number), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._open.move_to_end(number)
        return self._open[number]

    def _check(self, number: int, descriptor: int) -> None:
        """Raise `DataChanged` unless the file is unchanged by its size and times, or by its hash."""
        status, entry = os.fstat(descriptor), self._entries[number]
        times = _file_times(status)
        if self._checked.get(number) == times:
            return
        is_verified = number not in self._checked and self._verified.get(entry.file) == file_signature(entry, status)
        if not is_verified and (status.st_size != entry.bytes or _sha256(descriptor) != entry.sha256):
            hint = "restore the file, and the same command resumes from the last checkpoint"
            raise DataChanged(f"{self._path(number)} has changed since it was prepared: its SHA-256 differs; {hint}")
        self._checked[number] = times


def _sha256(descriptor: int) -> str:
    digest, position = hashlib.sha256(), 0
    while chunk := os.pread(descriptor, _CHUNK_BYTES, position):
        digest.update(chunk)
        position += len(chunk)
    return digest.hexdigest()
