"""Which checkpoint a path means: itself, or the newest in a run's directory."""

from __future__ import annotations

import os
from pathlib import Path

from ...comm.errors import ConfigError, Problem
from .manifest import MANIFEST, MARKER, Damaged
from .opened import Checkpoint
from .store import CheckpointStore, step_of

FOLDER = "checkpoints"
"""Of a run directory."""


def store_at(path: Path) -> CheckpointStore:
    """The checkpoints of the run in `path`, or in `path` itself. For reading: nothing is ever let go."""
    return CheckpointStore(path / FOLDER if (path / FOLDER).is_dir() else path, keep=1)


def find_checkpoint(path: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint at `path`, or that of `step`, or the newest of the run there. Raises `ConfigError`."""
    try:
        return Checkpoint.open(find_directory(path, step))
    except Damaged as damaged:
        hint = "is damaged; `shoestring checkpoint verify` says more, --step takes another"
        raise ConfigError([Problem("checkpoint", str(damaged), hint)]) from damaged
    except OSError as error:
        raise unreadable(error) from error


def find_directory(path: Path, step: int | None = None) -> Path:
    """The directory of that checkpoint, whole or damaged. Raises `ConfigError` where there is none, and `OSError`."""
    is_one = any(os.path.lexists(path / name) for name in (MANIFEST, MARKER))
    if is_one or (step_of(path) is not None and path.is_dir()):
        return path
    store = store_at(path)
    steps = store.steps()
    if step is not None and step not in steps:
        has = ", ".join(map(str, steps)) or "none"
        raise ConfigError([Problem("--step", step, f"there is no such checkpoint in {store.directory}; it has {has}")])
    if not steps:
        hint = "holds no checkpoint; name a run directory, or the directory of one checkpoint"
        raise ConfigError([Problem("checkpoint", str(path), hint)])
    return store.path(steps[-1] if step is None else step)


def unreadable(error: OSError) -> ConfigError:
    """A checkpoint that may be whole."""
    return ConfigError([Problem("checkpoint", str(error), "cannot be read now; nothing was changed")])
