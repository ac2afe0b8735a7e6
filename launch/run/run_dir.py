"""The directory that one run owns: claimed by one launcher at a time, emptied only if a run has made it.

A marker, the first file of a new run directory, tells it from any other directory: a `config.yaml` lies in many. A
launch waits for a bounded time until the one before it has let go of the directory.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ...comm.errors import ConfigError, Problem, raise_if_any
from ...comm.files.file_io import raise_if_not_regular_file, read_json, replace_file_atomically
from ...comm.files.lock import acquire_exclusive_lock
from ...comm.files.strict_json import MalformedFileError
from ..console import print_to_stderr

CONFIG_FILE = "config.yaml"
STATUS_FILE = "run_status.json"
_STATUS_BYTES = 10**6
_LOCK_FILE = "lock"
_RESERVE_FILE = "run_status.reserve"
_RESERVE_BYTES = 16 * 1024
"""Some blocks of any file system: the launcher's heartbeat may take one when they are freed."""
_MARKER_FILE = ".shoestring_run"
_MARKER_TEXT = "This directory was made by a training run of Shoestring; `shoestring train --fresh` empties it.\n"


@contextmanager
def lock_run_dir(run_dir: Path, *, fresh: bool) -> Iterator[None]:
    """Hold `run_dir`, made if it is not there and emptied if `fresh`, for as long as this process lives.

    Raises `ConfigError` for a directory that another launcher holds, that cannot be written, or that is not a run's.
    """
    create_run_dir(run_dir)
    with _refusing_to_fail(run_dir):
        raise_if_not_regular_file(run_dir / _LOCK_FILE)
        lock = (run_dir / _LOCK_FILE).open("a")
    with lock:
        _lock(lock.fileno(), run_dir)
        if fresh:
            with _refusing_to_fail(run_dir):
                _empty(run_dir)
        yield


def run_dir_problems(run_dir: Path) -> Iterator[Problem]:
    """What keeps a run from taking `run_dir`: it is there, and neither empty nor made by a run."""
    if run_dir.exists() and not _is_a_runs(run_dir):
        hint = f"exists and was not made by a run (it holds no {_MARKER_FILE}); name another directory"
        yield Problem("training.run_dir", str(run_dir), hint)


def is_run_dir(run_dir: Path) -> bool:
    """Whether a run has made `run_dir`."""
    return (run_dir / _MARKER_FILE).exists()


def create_run_dir(run_dir: Path) -> None:
    """Make `run_dir` a run's, whether or not it is there. Raises `ConfigError` for one that holds anything else."""
    with _refusing_to_fail(run_dir):
        raise_if_any(run_dir_problems(run_dir))
        with _removing_if_it_fails(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            if not (run_dir / _MARKER_FILE).exists():
                replace_file_atomically(run_dir / _MARKER_FILE, _MARKER_TEXT.encode())


@contextmanager
def _removing_if_it_fails(folder: Path) -> Iterator[None]:
    """On an error of the system, remove `folder` and the folders above it that were not there before and are empty."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    except OSError:
        with suppress(OSError):
            for each in made:
                each.rmdir()
        raise


@contextmanager
def _refusing_to_fail(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = str(error) if error.strerror is None else error.strerror
        if error.filename is not None:  # a write to an open file names none
            reason = f"{reason}: {error.filename}"
        hint = f"cannot be written ({reason}); name another directory"
        raise ConfigError([Problem("training.run_dir", str(run_dir), hint)]) from error


def _is_a_runs(run_dir: Path) -> bool:
    if not run_dir.is_dir():
        return False
    names = {path.name for path in run_dir.iterdir()}
    # The marker's unfinished file alone: another machine of this launch is making the directory, or one that was killed.
    return _MARKER_FILE in names or names <= {f"{_MARKER_FILE}.new"}


def _lock(descriptor: int, run_dir: Path) -> None:
    """The kernel lets go of the lock when this process ends, however it ends."""
    held = "another run is going on in it; wait for it, stop it, or name another directory"
    acquire_exclusive_lock(descriptor, "training.run_dir", str(run_dir), held)


def _empty(run_dir: Path) -> None:
    """Remove everything but the lock and the marker. What a link points to is not the run's to remove."""
    for path in run_dir.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (_LOCK_FILE, _MARKER_FILE):
            path.unlink()


def reserve_status_space(run_dir: Path) -> None:
    """Take room on the disk that `write_run_status` will need: a disk that fills up meanwhile must not change exit codes.

    Raises `ConfigError` where there is none.
    """
    with _refusing_to_fail(run_dir):
        path = run_dir / _RESERVE_FILE
        if not (path.exists() and path.stat().st_size == _RESERVE_BYTES):
            replace_file_atomically(path, b" " * _RESERVE_BYTES)


def write_run_status(run_dir: Path, code: int, reason: str) -> None:
    """What a worker that stops on purpose leaves for its launcher, since torchrun turns every exit code into 1."""
    (run_dir / _RESERVE_FILE).unlink(missing_ok=True)
    replace_file_atomically(run_dir / STATUS_FILE, (json.dumps({"exit_code": code, "reason": reason}) + "\n").encode())


def write_run_config(run_dir: Path, text: str) -> None:
    """Leave the run's configuration in its directory. A link in its place is replaced, not written through."""
    replace_file_atomically(run_dir / CONFIG_FILE, text.encode())


def clear_run_status(run_dir: Path) -> None:
    """Forget how the last launch ended: another one begins."""
    (run_dir / STATUS_FILE).unlink(missing_ok=True)


def _say(text: str) -> None:
    print_to_stderr(f"shoestring train: {text}")


def read_run_status(run_dir: Path, warn: Callable[[str], None] = _say) -> Mapping[str, object] | None:
    """What a worker of the last launch has left, or None where all of them ended otherwise.

    A status that cannot be read, of a machine that lost power while it was written, counts as none, and `tell` is told.
    """
    path = run_dir / STATUS_FILE
    try:
        status = read_json(path, _STATUS_BYTES)
        return {"exit_code": status["exit_code"].as_integer(0, 255), "reason": status["reason"].as_string()}
    except FileNotFoundError:
        return None
    except (MalformedFileError, OSError) as error:
        warn(f"{path} does not say how the last launch ended ({error}): it counts as one that did not end as it should")
        return None


_SECONDS_BETWEEN_LOOKS = 0.5


def wait_for_run_dir_lock(run_dir: Path, seconds: float) -> None:
    """Return when no launcher holds `run_dir`, or after so many seconds; what cannot be locked is not waited for."""
    deadline, has_said = time.monotonic() + seconds, False
    while time.monotonic() < deadline and _is_held(run_dir):
        if not has_said:
            print_to_stderr(
                f"shoestring train: waiting up to {seconds:g} s for the launch before this one to let go of {run_dir}"
            )
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
