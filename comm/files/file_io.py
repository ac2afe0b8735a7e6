"""Files that may be anybody's: opened without waiting, read within a bound, written by a new name and a rename."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from ..errors import ConfigError, Problem
from .strict_json import JsonValue, MalformedFileError, parse_json

MAX_FILE_BYTES = 2**29
"""Of a file that is read as a whole. The manifest of DeepSeek-V3 on 2,048 ranks has about 100 MB."""

MAX_LINE_BYTES = 2**23
"""Of a file that is read line by line; a step of 61 layers of 256 experts takes 100 kB."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular_file(path: Path) -> BufferedReader:
    """Open a regular file, or a link to one, for reading; a FIFO is never waited for.

    Raises `MalformedFileError` for a folder, FIFO, socket or device, and `OSError` where there is nothing to open.
    """
    _refuse_other_kinds(path, path.stat().st_mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse_other_kinds(path, os.fstat(descriptor).st_mode)  # it may have been replaced in between
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _refuse_other_kinds(path: Path, mode: int) -> None:
    for is_kind, name in _KINDS:
        if is_kind(mode):
            raise MalformedFileError("", str(path), f"is {name}, not a regular file")


def read_regular_file(path: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """All bytes of a regular file. Raises like `open_regular_file`, and `MalformedFileError` for one of more than `most` bytes."""
    with open_regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise MalformedFileError("", size, f"is too large: at most {max_bytes} bytes are read")
        return file.read(max_bytes)


def read_bounded_lines(file: BufferedReader, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[bytes]:
    """Yield the lines of `file` from where it stands, each with its newline; the last may have none.

    Raises `MalformedFileError` for a line of more than `most` bytes: a file of holes may be a terabyte without a newline, and
    `for line in file` would hold all of it.
    """
    while line := file.readline(max_line_bytes + 1):
        if len(line) > max_line_bytes:
            raise MalformedFileError(
                "", repr(line[:20]), f"begins a line of more than {max_line_bytes} bytes, and no line is that long"
            )
        yield line


def read_line_blocks(file: BufferedReader) -> Iterator[bytes]:
    """Yield the bytes of `file` in pieces of `MAX_LINE_BYTES`. Raises `MalformedFileError` for such a piece without a newline.

    For what is searched and not parsed, with the bound of `read_bounded_lines`.
    """
    while chunk := file.read(MAX_LINE_BYTES):
        if len(chunk) == MAX_LINE_BYTES and b"\n" not in chunk:
            raise MalformedFileError("", repr(chunk[:20]), f"stands in a line of more than {MAX_LINE_BYTES} bytes")
        yield chunk


def read_text(path: Path, max_bytes: int = MAX_FILE_BYTES) -> str:
    """The text of a regular file in UTF-8. Raises like `read_regular_file`."""
    try:
        return read_regular_file(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedFileError("", f"byte {error.start}", "is not UTF-8") from error


def read_json(path: Path, max_bytes: int = MAX_FILE_BYTES) -> JsonValue:
    """The tree in a JSON file. Raises `MalformedFileError` and `OSError`."""
    return parse_json(read_regular_file(path, max_bytes))


@contextlib.contextmanager
def config_error_context(path: Path | str, fix: str) -> Iterator[None]:
    """Turn what is wrong with the file at `path` into a refusal that names it; `fix` says what to do."""
    try:
        yield
    except MalformedFileError as error:
        raise ConfigError([error.to_problem(path, fix)]) from error
    except OSError as error:
        raise ConfigError([os_error_to_problem(error, path, fix)]) from error


def os_error_to_problem(error: OSError, path: Path | str, fix: str) -> Problem:
    """What the system said about a file, by the name that it has named if it has named one."""
    file = path if error.filename is None else os.fsdecode(error.filename)
    return Problem(str(file), None, f"cannot be used: {error.strerror or error}; {fix}")


def unwritable_directory_hint(error: OSError) -> str:
    """What to do where a directory cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "make room, or name another directory" if full else "name another directory"


def replace_file_atomically(path: Path, raw: bytes) -> None:
    """Give `path` the content `raw` in one step that survives a crash: a new file, brought to the disk, renamed.

    A link at `path` is replaced, and what it points to is left alone. For files with one writer at a time: the new
    file is always `NAME.new`, so that a crash leaves one at most. Raises `OSError`; then `path` is as it was.
    """
    new = path.with_name(f"{path.name}.new")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()  # of a writer that was killed, or a link that somebody has put there
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def raise_if_not_regular_file(path: Path) -> None:
    """Raise `ConfigError` where `path`, which is about to be written, is a link, or no regular file."""
    with contextlib.suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            kind = (
                "a link" if stat.S_ISLNK(mode) else next((name for is_kind, name in _KINDS if is_kind(mode)), "other")
            )
            hint = "is in the place of a file that is written; a run writes through no link: remove it"
            raise ConfigError([Problem(str(path), kind, hint)])
