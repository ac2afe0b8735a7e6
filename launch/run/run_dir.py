"""Run directory: locked by one launcher at a time, and emptied only if a run has created it.

A marker, the first file of a new run directory, distinguishes it from other directories, of which many hold a
`config.yaml`. A launcher waits for a limited time until the previous one has released the lock. Records keep a
scheduler from restarting a run that makes no progress, or an attempt that ended on purpose.
"""

import fcntl
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ...comm.errors import ConfigError, Problem, raise_if_any
from ...comm.files.file_io import raise_if_not_regular_file, read_json, read_text, replace_file_atomically
from ...comm.files.lock import acquire_exclusive_lock
from ...comm.files.strict_json import MalformedFileError
from ..console import print_to_stderr

CONFIG_FILE = "config.yaml"
STATUS_FILE = "run_status.json"
_STATUS_BYTES = 10**6
_LOCK_FILE = "lock"
_RESERVE_FILE = "run_status.reserve"
_RESERVE_BYTES = 16 * 1024
"""Several blocks of any file system: the launcher's heartbeat may take one of them when they are freed."""
_STOPS_FILE, _ENDED_FILE = "stops_without_step", "ended"
_MAX_RECORD_BYTES = 1000
MAX_STOPS_WITHOUT_STEP = 3
"""Consecutive stops without a step after which the run exits with 1, so that no scheduler requeues it."""
_MARKER_FILE = ".shoestring_run"
_MARKER_TEXT = "This directory was made by a training run of Shoestring; `shoestring train --fresh` empties it.\n"


@contextmanager
def lock_run_dir(run_dir: Path, *, fresh: bool) -> Iterator[None]:
    """Lock `run_dir` for the context; create it if it is missing, and empty it if `fresh`.

    Raises `ConfigError` for a directory that another launcher holds, that cannot be written, or that no run created.
    """
    create_run_dir(run_dir)
    with _os_errors_as_config_errors(run_dir):
        raise_if_not_regular_file(run_dir / _LOCK_FILE)
        lock = (run_dir / _LOCK_FILE).open("a")
    with lock:
        # flock: the kernel releases the lock when this process ends, in whatever way it ends.
        held = "another run is active in it; wait for it, stop it, or use another directory"
        acquire_exclusive_lock(lock.fileno(), "training.run_dir", str(run_dir), held)
        if fresh:
            with _os_errors_as_config_errors(run_dir):
                _empty(run_dir)
        yield


def run_dir_problems(run_dir: Path) -> Iterator[Problem]:
    """Yield a problem if `run_dir` exists, is not empty and was not created by a run."""
    if run_dir.exists() and not _is_free_or_run_dir(run_dir):
        hint = f"exists and was not created by a run (it has no {_MARKER_FILE}); use another directory"
        yield Problem("training.run_dir", str(run_dir), hint)


def is_run_dir(run_dir: Path) -> bool:
    """Return whether a run has created `run_dir`."""
    return (run_dir / _MARKER_FILE).exists()


def create_run_dir(run_dir: Path) -> None:
    """Create `run_dir` with its marker, or keep it if a run created it. Raises `ConfigError` for other directories."""
    with _os_errors_as_config_errors(run_dir):
        raise_if_any(run_dir_problems(run_dir))
        with _remove_on_error(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            if not (run_dir / _MARKER_FILE).exists():
                replace_file_atomically(run_dir / _MARKER_FILE, _MARKER_TEXT.encode())


@contextmanager
def _remove_on_error(folder: Path) -> Iterator[None]:
    """Remove `folder` and its parents at an OSError, if they are empty and did not exist before."""
    created = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    except OSError:
        with suppress(OSError):
            for each in created:
                each.rmdir()
        raise


@contextmanager
def _os_errors_as_config_errors(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = str(error) if error.strerror is None else error.strerror
        if error.filename is not None:  # None for a write to an open file
            reason = f"{reason}: {error.filename}"
        hint = f"cannot be written ({reason}); use another directory"
        raise ConfigError([Problem("training.run_dir", str(run_dir), hint)]) from error


def _is_free_or_run_dir(run_dir: Path) -> bool:
    if not run_dir.is_dir():
        return False
    names = {path.name for path in run_dir.iterdir()}
    # Only the marker's temporary file: another node of this launch is creating the directory, or was killed meanwhile.
    return _MARKER_FILE in names or names <= {f"{_MARKER_FILE}.new"}


def _empty(run_dir: Path) -> None:
    """Remove everything but the lock and the marker; remove links, never their targets."""
    for path in run_dir.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (_LOCK_FILE, _MARKER_FILE):
            path.unlink()


def reserve_status_space(run_dir: Path) -> None:
    """Reserve the disk space of `write_run_status`, so that a disk that fills up does not change exit codes.

    Raises `ConfigError` if there is none.
    """
    with _os_errors_as_config_errors(run_dir):
        path = run_dir / _RESERVE_FILE
        if not (path.exists() and path.stat().st_size == _RESERVE_BYTES):
            replace_file_atomically(path, b" " * _RESERVE_BYTES)


def write_run_status(run_dir: Path, code: int, reason: str) -> None:
    """Write exit code and reason of a rank that stops on purpose, since torchrun turns every exit code into 1."""
    (run_dir / _RESERVE_FILE).unlink(missing_ok=True)
    replace_file_atomically(run_dir / STATUS_FILE, (json.dumps({"exit_code": code, "reason": reason}) + "\n").encode())


def write_run_config(run_dir: Path, text: str) -> None:
    """Write the run's configuration into its directory. A link in its place is replaced, not followed."""
    replace_file_atomically(run_dir / CONFIG_FILE, text.encode())


def read_run_status(run_dir: Path) -> Mapping[str, object] | None:
    """Return exit code and reason that a rank of the last attempt wrote; None if no rank stopped on purpose.

    A status that cannot be read, as after a power failure during the write, counts as none and is reported.
    """
    path = run_dir / STATUS_FILE
    try:
        status = read_json(path, _STATUS_BYTES)
        return {"exit_code": status["exit_code"].as_integer(0, 255), "reason": status["reason"].as_string()}
    except FileNotFoundError:
        return None
    except (MalformedFileError, OSError) as error:
        print_to_stderr(f"shoestring train: {path} cannot be read ({error}): the last attempt counts as failed")
        return None


_POLL_SECONDS = 0.5


def wait_for_run_dir_lock(run_dir: Path, seconds: float) -> None:
    """Return when no launcher holds `run_dir`, or after `seconds`; do not wait for a directory that has no lock."""
    deadline = time.monotonic() + seconds
    if _is_held(run_dir):
        print_to_stderr(f"shoestring train: waiting up to {seconds:g} s for the previous launch to release {run_dir}")
    while time.monotonic() < deadline and _is_held(run_dir):
        time.sleep(_POLL_SECONDS)


def _is_held(run_dir: Path) -> bool:
    try:
        with (run_dir / _LOCK_FILE).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


def record_stop(run_dir: Path, *, made_step: bool) -> None:
    """Record a requested stop; `made_step` tells whether the attempt completed a step. Skipped if the disk is full."""
    count = 0 if made_step else count_stops_without_step(run_dir) + 1
    with suppress(OSError):
        replace_file_atomically(run_dir / _STOPS_FILE, f"{count}\n".encode())


def count_stops_without_step(run_dir: Path) -> int:
    """Return the number of consecutive attempts that were stopped before their first step."""
    text = _read_record(run_dir / _STOPS_FILE)
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
        replace_file_atomically(run_dir / _ENDED_FILE, f"{attempt} {code}\n".encode())


def attempt_exit_code(run_dir: Path, attempt: str) -> int | None:
    """Return the exit code with which `attempt` ended on purpose; None if it did not."""
    name, _, code = _read_record(run_dir / _ENDED_FILE).rpartition(" ")
    is_code = code.isascii() and code.isdigit() and len(code) <= 3
    return int(code) if name == attempt and is_code else None


def _read_record(path: Path) -> str:
    try:
        return read_text(path, _MAX_RECORD_BYTES).strip()
    except (OSError, MalformedFileError):
        return ""
