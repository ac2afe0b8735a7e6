"""Words for a person on standard output, which may be closed, full, or a pipe that nobody reads any more."""

from __future__ import annotations

import io
import os
import sys


def say(text: str) -> None:
    """Print `text` now, or drop it where it cannot be shown: no work is lost for a view of it.

    After a failure standard output is the null device, so that Python's own last flush fails no more.
    """
    if sys.stdout is None:  # a program that was started without one
        return
    try:
        print(text, flush=True)
    except (OSError, ValueError):  # ValueError: it was closed by this process
        _show_nothing_more()


def _show_nothing_more() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, sys.stdout.fileno())
    except (OSError, ValueError):  # what stands in for standard output has no descriptor
        sys.stdout = io.StringIO()
    finally:
        os.close(null)
