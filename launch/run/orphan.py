"""No process outlives the one that started it: a killed launcher leaves no ranks behind (Linux only).

Nothing is imported here that takes time: a rank calls this before it loads torch, and is unprotected until then.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

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
    if _is_dead(int(launcher)) or os.getppid() in (1, int(launcher)):  # torchrun died before the line above
        sys.exit(1)


def _is_dead(pid: int) -> bool:
    """Also before its parent has asked for it: a zombie still has a number."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return True
    except OSError:  # no /proc
        return False
    return state in "ZX"
