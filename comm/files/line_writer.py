"""Appending whole lines to a file whose disk may be full for a while."""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

MAX_BACKLOG_BYTES = 64 * 2**20
"""Lines of so many bytes wait in memory: 200,000 records of a ledger, a day of steps of one second each and more."""


class LineWriter:
    """Append lines to the file at `path`, in order, each whole or not at all. One writer a file, one thread at a time.

    A line that the disk does not take waits in memory and is written before the next one, as soon as there is room.
    A reader never sees a part of a line that another line follows.
    """

    def __init__(self, path: Path, *, max_backlog_bytes: int = MAX_BACKLOG_BYTES) -> None:
        """Open or create the file, which must end with a newline (see `cut_torn_line`). Raises `OSError`."""
        self._file: BinaryIO = path.open("ab", buffering=0)
        self._end = self._file.seek(0, os.SEEK_END)
        self._backlog: deque[bytes] = deque()
        self._backlog_bytes = 0
        self._limit = max_backlog_bytes
        self._failure: OSError | None = None

    def fileno(self) -> int:
        """Return the file's descriptor, for locks."""
        return self._file.fileno()

    @property
    def bytes_written(self) -> int:
        """Bytes of whole lines in the file."""
        return self._end

    @property
    def pending_lines(self) -> int:
        """Lines that are not in the file yet."""
        return len(self._backlog)

    @property
    def write_error(self) -> str | None:
        """Why lines wait; None where none does."""
        return None if self._failure is None else self._failure.strerror or str(self._failure)

    @property
    def is_deleted(self) -> bool:
        """Whether the file has no name any more: what is appended is lost when it is closed."""
        return not self._file.closed and os.fstat(self._file.fileno()).st_nlink == 0

    def append(self, line: bytes) -> bool:
        """Append `line`, which ends with a newline, now or when there is room; return False where it is left out.

        It is left out where the lines that wait already have `backlog_bytes`.
        """
        self.flush()
        if self._backlog and self._backlog_bytes + len(line) > self._limit:
            return False
        self._backlog.append(line)
        self._backlog_bytes += len(line)
        self.flush()
        return True

    def flush(self) -> bool:
        """Write what waits; return whether nothing waits any more."""
        try:
            while self._backlog:
                self._write(self._backlog[0])
                self._backlog_bytes -= len(self._backlog.popleft())
        except OSError as error:
            self._failure = error
            with suppress(OSError):
                self._cut()
            return False
        self._failure = None
        return True

    def fsync(self) -> bool:
        """Bring what was appended to the disk; return whether all of it is there."""
        if not self.flush():
            return False
        try:
            os.fsync(self._file.fileno())
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Try to write what waits, then close; a second call does nothing."""
        if not self._file.closed:
            self.fsync()
            self._file.close()

    def _write(self, line: bytes) -> None:
        self._cut()
        left = memoryview(line)
        while left:
            left = left[os.write(self._file.fileno(), left) :]
        self._end += len(line)

    def _cut(self) -> None:
        """Remove the part of a line that a full disk or a signal has left, so that readers find whole lines."""
        size = os.fstat(self._file.fileno()).st_size
        if size > self._end:
            os.ftruncate(self._file.fileno(), self._end)
        self._end = min(self._end, size)  # smaller: somebody has emptied the file
