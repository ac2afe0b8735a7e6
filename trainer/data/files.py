"""Crash-safe files: hashed as they are written, and synced to disk before they are used."""

from __future__ import annotations

import hashlib
import os
from contextlib import closing
from pathlib import Path

from .manifest import FileEntry


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
