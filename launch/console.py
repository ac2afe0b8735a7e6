"""Output to the standard streams that never stops the work.

A standard stream may be closed, on a full disk, or a pipe or terminal without a reader.
"""

import io
import os
import sys
from contextlib import suppress

from ..comm.errors import ConfigError, Problem, escape_unprintable

INVALID_CONFIGURATION = "error: invalid configuration (nothing was started)"
"""Heading of the problems that end a command before it starts a process."""
RESUME_HINT = "Run the same command again to resume from the last checkpoint."
"""Last sentence of the message of a run that ended early."""


def print_to_stderr(text: str) -> None:
    """Print `text` on standard error; drop it if the terminal has gone or the disk is full.

    Control characters are escaped: names in the text may come from other people.
    """
    with suppress(OSError, ValueError, RuntimeError):
        print(escape_unprintable(text), file=sys.stderr, flush=True)


def print_config_error(program: str, heading: str, error: ConfigError) -> None:
    """Print the problems of `error` on standard error, one per line, below `program: heading`."""
    for line in (f"{program}: {heading}", *(f"  {problem}" for problem in error.problems)):
        print_to_stderr(line)


def print_to_stdout(text: str) -> None:
    """Print `text` on standard output and flush it, or drop it if it cannot be written; escape control characters."""
    if sys.stdout is None:  # the program was started without one
        return
    try:
        print(escape_unprintable(text), flush=True)
    except (OSError, ValueError):  # ValueError: it was closed by this process
        _discard_stdout()


def print_or_raise(text: str) -> None:
    """Print `text`, the whole result of a verb, on standard output.

    A closed pipe is not an error: a reader such as `head` has read what it wanted. Raises `ConfigError` if the text
    cannot be written, for example on a full disk.
    """
    if sys.stdout is None:
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _discard_stdout()
    except OSError as error:
        _discard_stdout()
        hint = f"cannot be written ({error.strerror}); the result was not printed"
        raise ConfigError([Problem("standard output", None, hint)]) from error


def _discard_stdout() -> None:
    # The null device takes Python's last flush, which would fail again and change the exit code.
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, sys.stdout.fileno())
    except (OSError, ValueError):  # a replacement of standard output that has no descriptor
        sys.stdout = io.StringIO()
    finally:
        os.close(null)


def open_standard_streams() -> None:
    """Open each standard stream that this process was started without on the null device.

    Otherwise the next file that is opened becomes standard output, and `sys.stdout` is None.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, PTH123 -- until the process ends
