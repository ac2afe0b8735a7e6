"""No process outlives the one that started it: a killed launcher leaves no ranks behind (Linux only).

Nothing is imported here that takes time: a rank calls this before it loads torch, and is unprotected until then.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

LAUNCHER_VARIABLE = "SHOESTRING_LAUNCHER_PID"

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: between fork and exec is no place for it


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def die_with_launcher() -> None:
    """In a rank: die with torchrun, which dies with the launcher; at once if the launcher has died already."""
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is None or "RANK" not in os.environ:
        return
    die_with_parent()
    try:
        os.kill(int(launcher), 0)
    except ProcessLookupError:
        sys.exit(1)
