"""Which checkpoint a path means: itself, or the newest in a run's directory."""

from __future__ import annotations

import os
from pathlib import Path

from ...comm.errors import ConfigError, Problem
from .checkpoint import Checkpoint
from .manifest import COMPLETE_MARKER_FILE, MANIFEST_FILE, CheckpointDamaged
from .store import CheckpointStore, parse_checkpoint_step

CHECKPOINTS_FOLDER = "checkpoints"
"""Of a run directory."""


def open_checkpoint_store(path: Path) -> CheckpointStore:
    """The checkpoints of the run in `path`, or in `path` itself. For reading: nothing is ever let go."""
    return CheckpointStore(path / CHECKPOINTS_FOLDER if (path / CHECKPOINTS_FOLDER).is_dir() else path, keep_last=1)


def find_checkpoint(path: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint at `path`, or that of `step`, or the newest of the run there. Raises `ConfigError`."""
    try:
        return Checkpoint.open(find_checkpoint_directory(path, step))
    except CheckpointDamaged as damaged:
        hint = "is damaged; `shoestring checkpoint verify` says more, --step takes another"
        raise ConfigError([Problem("checkpoint", str(damaged), hint)]) from damaged
    except OSError as error:
        raise unreadable_checkpoint_error(error) from error


def find_checkpoint_directory(path: Path, step: int | None = None) -> Path:
    """The directory of that checkpoint, whole or damaged. Raises `ConfigError` where there is none, and `OSError`."""
    is_one = any(os.path.lexists(path / name) for name in (MANIFEST_FILE, COMPLETE_MARKER_FILE))
    if is_one or (parse_checkpoint_step(path) is not None and path.is_dir()):
        return path
    store = open_checkpoint_store(path)
    steps = store.steps()
    if step is not None and step not in steps:
        has = ", ".join(map(str, steps)) or "none"
        raise ConfigError([Problem("--step", step, f"there is no such checkpoint in {store.directory}; it has {has}")])
    if not steps:
        hint = "holds no checkpoint; name a run directory, or the directory of one checkpoint"
        raise ConfigError([Problem("checkpoint", str(path), hint)])
    return store.checkpoint_path(steps[-1] if step is None else step)


def unreadable_checkpoint_error(error: OSError) -> ConfigError:
    """A checkpoint that may be whole."""
    return ConfigError([Problem("checkpoint", str(error), "cannot be read now; nothing was changed")])
