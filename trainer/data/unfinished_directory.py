"""Directories that are being written: locked while their writer runs; those of dead writers are removed later."""

import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path

from ...comm.errors import ConfigError, Problem

_LOCK = ".lock"


class WriterLiveness(Enum):
    """State of the process that writes a directory."""

    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"
    """No lock: the file system has no locks, or the writer was killed just before or after it held one."""


@contextmanager
def unfinished_directory(final: Path, what: str, field: str) -> Iterator[Path]:
    """Create a directory next to `final` for writing, with `what` in its name.

    Call `remove_lock`, then rename it. A directory that was not renamed by the end of the block is removed. Raises
    `ConfigError` about `field` if it cannot be created.
    """
    # A sibling is on the same file system, so the rename moves no bytes.
    directory = final.with_name(f".{final.name}.{what}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        try:
            directory.mkdir(parents=True)
        except OSError as error:
            hint = f"cannot be created: {error.strerror}; name another directory"
            raise ConfigError([Problem(field, str(final), hint)]) from error
        with lock_directory(directory):
            yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """Hold the lock of a new directory, if the file system has locks."""
    new = directory / f"{_LOCK}.new"
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            new.rename(directory / _LOCK)  # renamed after locking: under its final name it is never unlocked
        except OSError:
            new.unlink()
        yield
    finally:
        os.close(descriptor)


def remove_lock(directory: Path) -> None:
    """Remove the lock from a directory that is complete."""
    (directory / _LOCK).unlink(missing_ok=True)


def check_writer_liveness(directory: Path) -> WriterLiveness:
    """Return whether the process that writes `directory` is alive."""
    try:
        descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return WriterLiveness.UNKNOWN
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return WriterLiveness.ALIVE
    except OSError:
        return WriterLiveness.UNKNOWN
    finally:
        os.close(descriptor)
    return WriterLiveness.DEAD


def remove_unfinished_directories(final: Path, what: str, report: Callable[[str], None]) -> None:
    """Remove the directories of killed writers of `final`; report each leftover to `report`."""
    for leftover in sorted(final.parent.glob(f".{glob.escape(final.name)}.{what}-*")):
        found = check_writer_liveness(leftover)
        if found is WriterLiveness.DEAD:
            with suppress(OSError):
                shutil.rmtree(leftover)
        if not leftover.exists():
            report(f"{leftover} was left by a process that was killed; it is removed.")
        elif found is WriterLiveness.ALIVE:
            report(f"{leftover} is being written by another process.")
        else:
            report(f"{leftover} was left by another process. If none is running, delete it.")
