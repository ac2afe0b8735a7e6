"""Words for the person who started a run: where nobody can read them, the run goes on."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def say(text: str) -> None:
    """Print `text` on standard error; a terminal that has gone or a full disk behind it changes nothing."""
    with suppress(OSError, ValueError, RuntimeError):
        print(text, file=sys.stderr, flush=True)


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
