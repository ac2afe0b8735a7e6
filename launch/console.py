"""Words for the person who started a run: where nobody can read them, the work goes on.

A standard stream may be closed, on a full disk, or a pipe or a terminal that has gone.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress

from ..comm.errors import ConfigError, Problem, escape_unprintable


def print_to_stderr(text: str) -> None:
    """Print `text` on standard error; a terminal that has gone or a full disk behind it changes nothing.

    Control characters are escaped: names in it may come from others.
    """
    with suppress(OSError, ValueError, RuntimeError):
        print(escape_unprintable(text), file=sys.stderr, flush=True)


def print_to_stdout(text: str) -> None:
    """Print `text`, a result, on standard output now, or drop it where it cannot be shown; see `print_to_stderr` on escapes.

    After a failure standard output is the null device, so that Python's own last flush fails no more.
    """
    if sys.stdout is None:  # a program that was started without one
        return
    try:
        print(escape_unprintable(text), flush=True)
    except (OSError, ValueError):  # ValueError: it was closed by this process
        _show_nothing_more()


def print_or_raise(text: str) -> None:
    """Print `text`, all that a verb was asked for, on standard output.

    A reader that has left, as `head` does, has read what it wanted. Raises `ConfigError` where a disk does not take it.
    """
    if sys.stdout is None:
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _show_nothing_more()
    except OSError as error:
        _show_nothing_more()
        hint = f"cannot be written ({error.strerror}); what was asked for is shown nowhere"
        raise ConfigError([Problem("standard output", None, hint)]) from error


def _show_nothing_more() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, sys.stdout.fileno())
    except (OSError, ValueError):  # what stands in for standard output has no descriptor
        sys.stdout = io.StringIO()
    finally:
        os.close(null)


def open_standard_streams() -> None:
    """Give this process the standard streams that it was started without, on the null device.

    Else the next file that is opened becomes standard output, and `sys.stdout` is None.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, PTH123 -- until the process ends
