"""Shards read as they are needed: a few are open at a time, and none is believed before its hash was checked.

A corpus of 280 GB has 1,049 shards, and a process may open 1,024 files. A memory map would hold its file open, and
would end the process by a signal where the file is cut short; so ranges are read, ten microseconds slower.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .manifest import FileEntry
from .verified_files import file_signature

MAX_OPEN_FILES = 64
"""Files of one split that are open at a time."""
_CHUNK_BYTES = 2**22


class DataChanged(Exception):  # noqa: N818 -- says what happened
    """A shard is not what was written: it was damaged or replaced while a run was reading it."""


@dataclass(frozen=True)
class _Marks:
    """What any write to a file changes. The time of change can be set back by a person, that of the inode cannot."""

    size: int
    mtime_ns: int
    ctime_ns: int

    @staticmethod
    def of(status: os.stat_result) -> _Marks:
        return _Marks(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class ShardFileReader:
    """The shards of one split in `directory`. For one thread.

    The SHA-256 of a shard is checked when it is read first, unless `stamp` says that it was checked as it is now, and
    again whenever its marks are others than then: a read that returns has read what was written.
    """

    def __init__(
        self,
        directory: Path,
        entries: Sequence[FileEntry],
        dtype: np.dtype[Any],
        stamp: Mapping[str, object],
        most_open: int = MAX_OPEN_FILES,
    ) -> None:
        self._directory = directory
        self._entries = entries
        self._dtype = dtype
        self._stamp = stamp
        self._most_open = most_open
        self._open: OrderedDict[int, int] = OrderedDict()
        self._checked: dict[int, _Marks] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __del__(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def read_tokens(self, number: int, first: int, count: int) -> npt.NDArray[Any]:
        """Tokens `first` to `first + count` (excluded) of shard `number`. Raises `DataChanged`."""
        path, size = self._path(number), self._dtype.itemsize
        try:
            descriptor = self._descriptor(number)
            self._check(number, descriptor)
            raw = os.pread(descriptor, count * size, first * size)
            while self._checked[number] != _Marks.of(os.fstat(descriptor)):  # a write has come between
                self._check(number, descriptor)
                raw = os.pread(descriptor, count * size, first * size)
        except OSError as error:
            raise DataChanged(
                f"{path} cannot be read: {error.strerror}; when it can, the same command goes on"
            ) from error
        return np.frombuffer(raw, self._dtype)

    def _path(self, number: int) -> Path:
        return self._directory / self._entries[number].file

    def _descriptor(self, number: int) -> int:
        """Of the open file; those that were not read for longest are closed."""
        if number not in self._open:
            while len(self._open) >= self._most_open:
                os.close(self._open.popitem(last=False)[1])
            self._open[number] = os.open(self._path(number), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._open.move_to_end(number)
        return self._open[number]

    def _check(self, number: int, descriptor: int) -> None:
        """Make sure that the file holds what was written, by its marks or by its hash."""
        status, entry = os.fstat(descriptor), self._entries[number]
        marks = _Marks.of(status)
        if self._checked.get(number) == marks:
            return
        is_stamped = number not in self._checked and self._stamp.get(entry.file) == file_signature(entry, status)
        if not is_stamped and (marks.size != entry.bytes or _sha256(descriptor) != entry.sha256):
            hint = "restore the file, and the same command goes on from the last checkpoint"
            raise DataChanged(f"{self._path(number)} is not what was prepared: its SHA-256 is another one; {hint}")
        self._checked[number] = marks


def _sha256(descriptor: int) -> str:
    digest, position = hashlib.sha256(), 0
    while chunk := os.pread(descriptor, _CHUNK_BYTES, position):
        digest.update(chunk)
        position += len(chunk)
    return digest.hexdigest()
