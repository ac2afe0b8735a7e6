"""Resolution of a path to a checkpoint: the path itself, or the newest one of a run directory."""

import os
from pathlib import Path

from ...comm.errors import ConfigError, Problem
from .checkpoint import Checkpoint
from .manifest import COMPLETE_MARKER_FILE, MANIFEST_FILE, damage_error_context
from .store import CheckpointStore, parse_checkpoint_step

CHECKPOINTS_FOLDER = "checkpoints"
"""Folder of the checkpoints in a run directory."""


def open_checkpoint_store(path: Path) -> CheckpointStore:
    """Return the checkpoints of the run in `path`, or those in `path` itself, for reading only."""
    return CheckpointStore(path / CHECKPOINTS_FOLDER if (path / CHECKPOINTS_FOLDER).is_dir() else path, keep_last=1)


def find_checkpoint(path: Path, step: int | None = None) -> Checkpoint:
    """Open the checkpoint at `path`, or of the run there the one of `step` or the newest. Raises `ConfigError`."""
    hint = "is damaged; `shoestring checkpoint verify` lists the damage, --step selects another checkpoint"
    try:
        with damage_error_context(hint):
            return Checkpoint.open(find_checkpoint_directory(path, step))
    except OSError as error:
        raise unreadable_checkpoint_error(error) from error


def find_checkpoint_directory(path: Path, step: int | None = None) -> Path:
    """Return the checkpoint's directory, intact or damaged. Raises `OSError`, and `ConfigError` if there is none."""
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
    """Return the error for a checkpoint that cannot be read but may be intact."""
    return ConfigError([Problem("checkpoint", str(error), "cannot be read now; nothing was changed")])
