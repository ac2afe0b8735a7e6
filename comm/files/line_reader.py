"""Reading of line files: a crash may leave a partial last line, which is neither read nor appended to."""

import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigError, Problem
from .file_io import MAX_LINE_BYTES, config_error_context, open_regular_file, read_bounded_lines, read_line_blocks

_CHUNK_BYTES = 64 * 1024


def truncate_partial_line(path: Path) -> None:
    """Remove what follows the last newline of the file at `path`: a write that a crash interrupted.

    A file without a newline becomes empty; a missing file is ignored. Raises `ConfigError` if more than
    `MAX_LINE_BYTES` follow.
    """
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            # No write is that long, so something else has damaged the file, and cutting it would lose data.
            if size - end > MAX_LINE_BYTES:
                hint = f"ends in more than {MAX_LINE_BYTES} bytes without a newline; restore the file"
                raise ConfigError([Problem(str(path), size, hint)])
            start = max(0, end - _CHUNK_BYTES)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                file.truncate(start + newline + 1)
                return
            end = start
        file.truncate(0)


def count_lines(path: Path) -> int:
    """Return the number of whole lines of the file at `path`. Raises `ConfigError` if it cannot be read."""
    with config_error_context(path, "restore it"), open_regular_file(path) as file:
        return sum(chunk.count(b"\n") for chunk in read_line_blocks(file))


def read_complete_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its newline). A last line without newline is still being written."""
    return LineReader(path).read_new_lines()


class FileReplacedError(Exception):
    """A growing file was truncated or replaced; its reader must start again."""


class LineReader:
    """Reads the whole lines of a file while it grows."""

    def __init__(self, path: Path, position: int = 0) -> None:
        """Start at byte `position`, the begin of a line, which gets the number 1."""
        self._path = path
        self._position = position
        self._number = 0
        self._inode: int | None = None

    def read_new_lines(self) -> Iterator[tuple[int, str]]:
        """Yield (line number from 1, line without its newline) of the lines appended since the last call.

        Raises `FileReplacedError`, `MalformedFileError` and `OSError`.
        """
        with open_regular_file(self._path) as file:
            status = os.fstat(file.fileno())
            if status.st_size < self._position or self._inode not in (None, status.st_ino):
                raise FileReplacedError
            self._inode = status.st_ino
            file.seek(self._position)
            for line in read_bounded_lines(file):
                if not line.endswith(b"\n"):  # still being written: its rest comes with the next call
                    return
                self._position += len(line)
                self._number += 1
                # Bytes that are not UTF-8 are kept as surrogates, so that the parser's error can show them.
                yield self._number, line[:-1].decode(errors="surrogateescape")
