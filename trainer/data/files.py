"""Crash-safe files: hashed as they are written, synced to disk before they are used, and limited in size."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from .manifest import FileEntry

T = TypeVar("T")


class HashedFileWriter:
    """Writer of a new file, front to back; `entry` is final after `close`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self._bytes = 0

    def write(self, raw: bytes) -> None:
        """Append `raw`."""
        self._file.write(raw)
        self._hash.update(raw)
        self._bytes += len(raw)

    def close(self) -> None:
        """Sync the file to disk and close it; a second call does nothing."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    @property
    def entry(self) -> FileEntry:
        """Name, size and hash of the bytes written so far."""
        return FileEntry(self._path.name, self._bytes, self._hash.hexdigest())


def write_file_durably(path: Path, raw: bytes) -> FileEntry:
    """Write a whole file and sync it to disk."""
    with closing(HashedFileWriter(path)) as file:
        file.write(raw)
    return file.entry


def fsync_directory(path: Path) -> None:
    """Sync a directory's entries to disk."""
    # Without it a crash may lose the name of a file whose bytes were synced.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def split_by_size(items: Iterable[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Split `items` in order into lists whose sizes add up to at most `most`; a larger item gets its own list."""
    part: list[T] = []
    total = 0
    for item in items:
        if part and total + size(item) > most:
            yield part
            part, total = [], 0
        part.append(item)
        total += size(item)
    if part:
        yield part
