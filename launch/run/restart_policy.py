"""Records that keep a scheduler from restarting a run that makes no progress, or an attempt that ended on purpose."""

from contextlib import suppress
from pathlib import Path

from ...comm.files.file_io import read_text, replace_file_atomically
from ...comm.files.strict_json import MalformedFileError

_FILE = "stops_without_step"
_ENDED = "ended"
_MAX_BYTES = 1000
MAX_STOPS_WITHOUT_STEP = 3
"""Consecutive stops without a step after which the run exits with 1, so that no scheduler requeues it."""


def record_stop(run_dir: Path, *, made_step: bool) -> None:
    """Record a requested stop; `made_step` tells whether the attempt completed a step. Skipped if the disk is full."""
    count = 0 if made_step else count_stops_without_step(run_dir) + 1
    with suppress(OSError):
        replace_file_atomically(run_dir / _FILE, f"{count}\n".encode())


def count_stops_without_step(run_dir: Path) -> int:
    """Return the number of consecutive attempts that were stopped before their first step."""
    text = _read(run_dir / _FILE)
    return int(text) if text.isascii() and text.isdigit() and len(text) < 4 else 0


def restart_blocker(run_dir: Path) -> str | None:
    """Return why the run should not be restarted unchanged, or None."""
    count = count_stops_without_step(run_dir)
    if count < MAX_STOPS_WITHOUT_STEP:
        return None
    return f"{count} attempts in a row were stopped before their first step; allow more time, then start again"


def record_attempt_exit(run_dir: Path, attempt: str, code: int) -> None:
    """Record that `attempt` ended on purpose with this exit code."""
    with suppress(OSError):
        replace_file_atomically(run_dir / _ENDED, f"{attempt} {code}\n".encode())


def attempt_exit_code(run_dir: Path, attempt: str) -> int | None:
    """Return the exit code with which `attempt` ended on purpose; None if it did not."""
    name, _, code = _read(run_dir / _ENDED).rpartition(" ")
    is_code = code.isascii() and code.isdigit() and len(code) <= 3
    return int(code) if name == attempt and is_code else None


def _read(path: Path) -> str:
    try:
        return read_text(path, _MAX_BYTES).strip()
    except (OSError, MalformedFileError):
        return ""
