"""The directory that one run owns: claimed by one launcher at a time, emptied only if it is a run's."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..comm.refusal import Problem, Refused

CONFIG_FILE = "config.yaml"
STATUS_FILE = "run_status.json"
_LOCK_FILE = "lock"


@contextmanager
def claimed(run_dir: Path, *, fresh: bool) -> Iterator[None]:
    """Hold `run_dir`, made if it is not there and emptied if `fresh`, for as long as this process lives.

    Raises `Refused` for a directory that another launcher holds, that cannot be written, or that is not a run's.
    """
    if run_dir.exists() and not _is_a_runs(run_dir):
        remedy = f"exists and is not a run directory (it holds no {CONFIG_FILE}); name another"
        raise Refused([Problem("training.run_dir", str(run_dir), remedy)])
    with _refusing_to_fail(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / _LOCK_FILE).open("a")
    with lock:
        _lock(lock.fileno(), run_dir)
        if fresh:
            with _refusing_to_fail(run_dir):
                _empty(run_dir)
        yield


@contextmanager
def _refusing_to_fail(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = f"cannot be written ({error.strerror}: {error.filename}); name another directory"
        raise Refused([Problem("training.run_dir", str(run_dir), remedy)]) from error


def _is_a_runs(run_dir: Path) -> bool:
    if not run_dir.is_dir():
        return False
    names = {path.name for path in run_dir.iterdir()}
    return CONFIG_FILE in names or names <= {_LOCK_FILE}


def _lock(descriptor: int, run_dir: Path) -> None:
    """The kernel lets go of the lock when this process ends, however it ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        remedy = "another run is going on in it; wait for it, stop it, or name another directory"
        raise Refused([Problem("training.run_dir", str(run_dir), remedy)]) from error


def _empty(run_dir: Path) -> None:
    """Remove everything but the lock; last what shows that the directory is a run's."""
    for path in run_dir.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (_LOCK_FILE, CONFIG_FILE):
            path.unlink()
    (run_dir / CONFIG_FILE).unlink(missing_ok=True)


def write_status(run_dir: Path, code: int, reason: str) -> None:
    """What a worker that stops on purpose leaves for its launcher, since torchrun turns every exit code into 1."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / STATUS_FILE).write_text(json.dumps({"exit_code": code, "reason": reason}) + "\n")


def clear_status(run_dir: Path) -> None:
    """Forget how the last launch ended: another one begins."""
    (run_dir / STATUS_FILE).unlink(missing_ok=True)


def read_status(run_dir: Path) -> Mapping[str, object] | None:
    """What a worker of the last launch has left, or None where all of them ended otherwise."""
    path = run_dir / STATUS_FILE
    status: Mapping[str, object] | None = json.loads(path.read_text()) if path.exists() else None
    return status
