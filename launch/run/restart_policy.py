"""What must not be started again for ever: a run that is always stopped before its first step, one that has ended."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ...comm.files.file_io import read_text, replace_file_atomically
from ...comm.files.strict_json import MalformedFileError

_FILE = "stops_without_step"
_ENDED = "ended"
_MOST_BYTES = 1000
MAX_STOPS_WITHOUT_STEP = 3
"""In a row; the last of them is a fault, and no scheduler starts the run again for it."""


def record_stop(run_dir: Path, *, made_step: bool) -> None:
    """Note a stop on request; `progressed` says whether a step was made since the launch. No disk space, no note."""
    count = 0 if made_step else count_stops_without_step(run_dir) + 1
    with suppress(OSError):
        replace_file_atomically(run_dir / _FILE, f"{count}\n".encode())


def count_stops_without_step(run_dir: Path) -> int:
    """Return how many stops in a row came before the first step of their launch."""
    try:
        text = read_text(run_dir / _FILE, _MOST_BYTES).strip()
    except (OSError, MalformedFileError):
        return 0
    return int(text) if text.isascii() and text.isdigit() and len(text) < 4 else 0


def restart_blocker(run_dir: Path) -> str | None:
    """Return why the run should not be started again as it was, or None."""
    count = count_stops_without_step(run_dir)
    if count < MAX_STOPS_WITHOUT_STEP:
        return None
    return f"{count} launches in a row were stopped before their first step; give them more time, then start again"


def record_attempt_exit(run_dir: Path, attempt: str, code: int) -> None:
    """Note that `attempt` has ended on purpose, with this exit code."""
    with suppress(OSError):
        replace_file_atomically(run_dir / _ENDED, f"{attempt} {code}\n".encode())


def attempt_exit_code(run_dir: Path, attempt: str) -> int | None:
    """Return the exit code with which `attempt` has ended on purpose; None where it has not."""
    try:
        name, _, code = read_text(run_dir / _ENDED, _MOST_BYTES).strip().rpartition(" ")
    except (OSError, MalformedFileError):
        return None
    is_code = code.isascii() and code.isdigit() and len(code) <= 3
    return int(code) if name == attempt and is_code else None
