"""Appending of whole lines to a file, also when the disk is full for a while."""

import os
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

MAX_BACKLOG_BYTES = 64 * 2**20
"""Most bytes of lines that wait in memory: 200,000 ledger records, more than a day of steps of one second."""


class LineWriter:
    """Appends whole lines to a file, in order. One writer per file, one thread at a time.

    A line that cannot be written waits in memory and is written before the next one. A reader never sees a partial
    line that another line follows.
    """

    def __init__(self, path: Path, *, max_backlog_bytes: int = MAX_BACKLOG_BYTES) -> None:
        """Open or create the file, which must end with a newline (`truncate_partial_line`). Raises `OSError`."""
        # Unbuffered: a buffered file would keep a part of a failed write and write it later, in the middle of a line.
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
    def pending_lines(self) -> int:
        """Number of lines that are not in the file yet."""
        return len(self._backlog)

    @property
    def write_error(self) -> str | None:
        """Reason of the last failed write; None if no line waits."""
        return None if self._failure is None else self._failure.strerror or str(self._failure)

    @property
    def is_deleted(self) -> bool:
        """True if the file was deleted: lines appended now are lost when it is closed."""
        return not self._file.closed and os.fstat(self._file.fileno()).st_nlink == 0

    def append(self, line: bytes) -> bool:
        """Append `line`, which ends with a newline, now or when there is room.

        Return False if it is dropped because `max_backlog_bytes` of lines already wait.
        """
        self.flush()
        if self._backlog and self._backlog_bytes + len(line) > self._limit:
            return False
        self._backlog.append(line)
        self._backlog_bytes += len(line)
        self.flush()
        return True

    def flush(self) -> bool:
        """Write the lines that wait; return whether all were written."""
        try:
            while self._backlog:
                self._write(self._backlog[0])
                self._backlog_bytes -= len(self._backlog.popleft())
        except OSError as error:
            self._failure = error
            with suppress(OSError):
                self._truncate_partial_line()
            return False
        self._failure = None
        return True

    def fsync(self) -> bool:
        """Flush to the disk; return whether every line is there."""
        if not self.flush():
            return False
        try:
            os.fsync(self._file.fileno())
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Try to write the lines that wait, then close; a second call does nothing."""
        if not self._file.closed:
            self.fsync()
            self._file.close()

    def _write(self, line: bytes) -> None:
        self._truncate_partial_line()
        left = memoryview(line)
        while left:
            left = left[os.write(self._file.fileno(), left) :]
        self._end += len(line)

    def _truncate_partial_line(self) -> None:
        """Remove the partial line that a full disk or a signal has left."""
        size = os.fstat(self._file.fileno()).st_size
        if size > self._end:
            os.ftruncate(self._file.fileno(), self._end)
        self._end = min(self._end, size)  # smaller: the file was truncated from outside
