"""Waiting for the launch before this one to let go of the run directory."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path

from ..say import say

_LOCK_FILE = "lock"
_SECONDS_BETWEEN_LOOKS = 0.5


def wait_until_free(run_dir: Path, seconds: float) -> None:
    """Return when no launcher holds `run_dir`, or after so many seconds; what cannot be locked is not waited for."""
    deadline, has_said = time.monotonic() + seconds, False
    while time.monotonic() < deadline and _is_held(run_dir):
        if not has_said:
            say(f"shoestring train: waiting up to {seconds:g} s for the launch before this one to let go of {run_dir}")
            has_said = True
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _is_held(run_dir: Path) -> bool:
    try:
        with (run_dir / _LOCK_FILE).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
