"""File access: non-blocking opens, bounded reads, atomic writes."""

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
"""Largest file that is read as a whole. The manifest of DeepSeek-V3 on 2,048 ranks has about 100 MB."""

MAX_LINE_BYTES = 2**23
"""Longest line that is read. A step of 61 layers of 256 experts takes 100 kB."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular_file(path: Path) -> BufferedReader:
    """Open a regular file, or a link to one, for reading.

    Raises `MalformedFileError` for a folder, FIFO, socket or device, and `OSError` if it cannot be opened.
    """
    _refuse_other_kinds(path, path.stat().st_mode)
    # O_NONBLOCK: opening a FIFO would else block until it has a writer. It may replace the file after the check above.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse_other_kinds(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _refuse_other_kinds(path: Path, mode: int) -> None:
    for is_kind, name in _KINDS:
        if is_kind(mode):
            raise MalformedFileError("", str(path), f"is {name}, not a regular file")


def read_regular_file(path: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Return all bytes of a regular file.

    Raises like `open_regular_file`, and `MalformedFileError` for more than `max_bytes` bytes.
    """
    with open_regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise MalformedFileError("", size, f"is too large: at most {max_bytes} bytes are read")
        return file.read(max_bytes)


def read_bounded_lines(file: BufferedReader, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[bytes]:
    """Yield the lines of `file` from its position, each with its newline; the last may have none.

    Raises `MalformedFileError` for a line of more than `max_line_bytes` bytes.
    """
    # `for line in file` would hold a whole line, and a sparse file may be a terabyte without a newline.
    while line := file.readline(max_line_bytes + 1):
        if len(line) > max_line_bytes:
            raise MalformedFileError(
                "", repr(line[:20]), f"begins a line of more than {max_line_bytes} bytes; no valid line is that long"
            )
        yield line


def read_line_blocks(file: BufferedReader) -> Iterator[bytes]:
    """Yield the bytes of `file` in blocks of `MAX_LINE_BYTES`, to be searched and not parsed.

    Raises `MalformedFileError` for a whole block without a newline.
    """
    while chunk := file.read(MAX_LINE_BYTES):
        if len(chunk) == MAX_LINE_BYTES and b"\n" not in chunk:
            raise MalformedFileError("", repr(chunk[:20]), f"is part of a line of more than {MAX_LINE_BYTES} bytes")
        yield chunk


def read_text(path: Path, max_bytes: int = MAX_FILE_BYTES) -> str:
    """Return the text of a regular file in UTF-8. Raises like `read_regular_file`."""
    try:
        return read_regular_file(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedFileError("", f"byte {error.start}", "is not UTF-8") from error


def read_json(path: Path, max_bytes: int = MAX_FILE_BYTES) -> JsonValue:
    """Return the content of a JSON file. Raises `MalformedFileError` and `OSError`."""
    return parse_json(read_regular_file(path, max_bytes))


@contextlib.contextmanager
def config_error_context(path: Path | str, fix: str, *, unreadable_fix: str | None = None) -> Iterator[None]:
    """Turn a `MalformedFileError` or `OSError` into a `ConfigError` that names `path`.

    `fix` says what to do, and `unreadable_fix` what to do instead about an `OSError`.
    """
    try:
        yield
    except MalformedFileError as error:
        raise ConfigError([error.to_problem(path, fix)]) from error
    except OSError as error:
        raise ConfigError([os_error_to_problem(error, path, unreadable_fix or fix)]) from error


def os_error_to_problem(error: OSError, path: Path | str, fix: str) -> Problem:
    """Return the problem of an `OSError`, about the file that the error names or else `path`."""
    file = path if error.filename is None else os.fsdecode(error.filename)
    return Problem(str(file), None, f"cannot be used: {error.strerror or error}; {fix}")


def unwritable_directory_hint(error: OSError) -> str:
    """Return a hint for a directory that cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "make room, or name another directory" if full else "name another directory"


def replace_file_atomically(path: Path, raw: bytes) -> None:
    """Replace the content of `path` by `raw` so that a crash leaves either the old or the new content.

    A link at `path` is replaced and its target stays as it is. One writer at a time. Raises `OSError`; `path` is then
    as it was.
    """
    # Always the same temporary name, so that crashes leave one file at most.
    new = path.with_name(f"{path.name}.new")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()  # left by a killed writer, or a link
    # O_EXCL and O_NOFOLLOW: a link put there meanwhile is refused, not written through.
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())  # before the rename: else a power loss could leave a renamed empty file
        new.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def raise_if_not_regular_file(path: Path) -> None:
    """Raise `ConfigError` if `path`, which is about to be written, is a link or another kind of file."""
    with contextlib.suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            kind = (
                "a link" if stat.S_ISLNK(mode) else next((name for is_kind, name in _KINDS if is_kind(mode)), "other")
            )
            hint = "is not a regular file, and a run writes only to regular files, not through links: remove it"
            raise ConfigError([Problem(str(path), kind, hint)])
