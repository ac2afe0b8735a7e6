"""Directory of a run's checkpoints: each is written under a temporary name, then renamed when it is complete."""

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...comm.errors import ConfigError, Problem
from ..data.files import fsync_directory, write_file_durably
from .checkpoint import Checkpoint
from .manifest import COMPLETE_MARKER_FILE, MANIFEST_FILE, CheckpointDamaged, merge_rank_records

_NAME = re.compile(r"step_(\d{8})")
_RESERVED_BYTES = 2**20
"""Bytes reserved for the manifest, other files of a checkpoint, and the run's own records during a save."""


@dataclass(frozen=True)
class CheckpointExtras:
    """Contents of a checkpoint other than tensors."""

    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON values."""
    attachments: Mapping[str, bytes] = field(default_factory=dict)
    """Contents of files by name."""
    required_tensors: frozenset[str] = frozenset()
    """Names of tensors without which the checkpoint is incomplete."""


def parse_checkpoint_step(path: Path) -> int | None:
    """Return the step in the name of a complete checkpoint's directory; None for any other name."""
    found = _NAME.fullmatch(path.name)
    return None if found is None else int(found.group(1))


@dataclass(frozen=True)
class CheckpointStore:
    """Directory of checkpoints that keeps the last `keep_last`."""

    directory: Path
    keep_last: int

    def steps(self) -> list[int]:
        """Return the steps of complete checkpoints, oldest first; they may have been damaged since."""
        if not self.directory.is_dir():
            return []
        return sorted(step for step in map(parse_checkpoint_step, self.directory.iterdir()) if step is not None)

    def checkpoint_path(self, step: int) -> Path:
        """Return the directory of the checkpoint of `step`, which may not exist."""
        return self.directory / f"step_{step:08d}"

    def partial_path(self, step: int) -> Path:
        """Return the directory of the checkpoint of `step` while it is written."""
        return self.directory / f"step_{step:08d}.partial"

    def open(self, step: int) -> Checkpoint:
        """Open the checkpoint of `step`. Raises `CheckpointDamaged`."""
        return Checkpoint.open(self.checkpoint_path(step))

    def open_last_intact(self) -> tuple[Checkpoint | None, list[CheckpointDamaged]]:
        """Return the newest checkpoint whose manifest and file sizes are right, and the errors of newer ones."""
        found: list[CheckpointDamaged] = []
        for step in reversed(self.steps()):
            try:
                return self.open(step), found
            except CheckpointDamaged as damaged:
                found.append(damaged)
        return None, found

    def remove_partial_saves(self) -> None:
        """Remove the leftovers of saves that a crash has ended. Call on one rank. Raises `OSError`."""
        for pattern in ("step_*.partial", "step_*.old"):
            for leftover in self.directory.glob(pattern):
                shutil.rmtree(leftover)

    def prepare_save(self, step: int, size: int = 0) -> str | None:
        """Create the directory of a new checkpoint with `size` bytes of tensors; return a warning or None.

        Call on one rank. If the disk has no space for one more checkpoint, those that would be removed after this save
        are removed before it, and the warning says so. The newest one always stays. Raises `OSError`, also if there is
        not enough space even then, or if the run's directory is gone.
        """
        self.directory.mkdir(exist_ok=True)
        self.remove_partial_saves()
        removed = self._make_room(size)
        self.partial_path(step).mkdir()
        fsync_directory(self.directory)
        if not removed:
            return None
        what = " and ".join(f"that of step {old}" for old in removed)
        return f"{what} was removed before the checkpoint of step {step} was written: not enough disk space for both"

    def _make_room(self, size: int) -> list[int]:
        """Remove the oldest checkpoints until `size` bytes and a reserve are free; return their steps.

        None is removed if that would not be enough, or if the newest one is damaged.
        """
        needed = size + size // 64 + _RESERVED_BYTES
        free = self._free()
        if free >= needed:
            return []
        steps, removed = self.steps(), list[int]()
        for old in steps[: -max(1, self.keep_last - 1)]:
            free += _size(self.checkpoint_path(old))
            removed.append(old)
            if free >= needed and not self._is_damaged(steps[-1]):
                for each in removed:
                    _remove(self.checkpoint_path(each))
                return removed
        spare = needed - size
        space = f"a checkpoint takes {size:,} bytes, {spare:,} more are kept free, and {self._free():,} are free"
        raise OSError(errno.ENOSPC, f"No space left: {space}")

    def _is_damaged(self, step: int) -> bool:
        try:
            self.open(step)
        except CheckpointDamaged:
            return True
        return False

    def _free(self) -> int:
        """Return the free bytes of the disk. A quota is not visible here: the save itself then fails."""
        return shutil.disk_usage(self.directory).free

    def commit_save(self, step: int, extras: CheckpointExtras) -> Path:
        """Turn the partial checkpoint into a complete one. Call on one rank, after all ranks have written.

        When it returns, the checkpoint survives any crash. Raises `OSError`, and `ValueError` if the files of the ranks
        are not the whole state.
        """
        partial, final = self.partial_path(step), self.checkpoint_path(step)
        records = sorted(partial.glob("part_*.json"))
        entries = [write_file_durably(partial / name, raw) for name, raw in extras.attachments.items()]
        manifest = merge_rank_records((json.loads(path.read_text()) for path in records), extras.metadata, entries)
        if missing := sorted(extras.required_tensors - manifest.tensors.keys()):
            raise ValueError(f"no rank has saved {missing[0]}, and {len(missing) - 1} more")
        text = manifest.to_json().encode()
        write_file_durably(partial / MANIFEST_FILE, text)
        write_file_durably(partial / COMPLETE_MARKER_FILE, f"{hashlib.sha256(text).hexdigest()}\n".encode())
        for path in records:
            path.unlink()
        fsync_directory(partial)
        _remove(final)  # left by an earlier attempt that resumed from before this step
        partial.rename(final)
        fsync_directory(self.directory)
        return final

    def remove_oldest(self) -> None:
        """Remove the oldest checkpoints beyond `keep_last`, on one rank; a failure is retried after the next save."""
        with suppress(OSError):
            for old in self.steps()[: -self.keep_last]:
                _remove(self.checkpoint_path(old))

    def discard_partial_save(self, step: int) -> None:
        """Remove the files of a save that cannot be finished. Call on one rank."""
        shutil.rmtree(self.partial_path(step), ignore_errors=True)

    def rename_damaged(self, step: int) -> Path:
        """Rename a damaged checkpoint so that runs skip it and it can be inspected. Call on one rank."""
        damaged_path = self.checkpoint_path(step).with_suffix(".damaged")
        shutil.rmtree(damaged_path, ignore_errors=True)
        return self.checkpoint_path(step).rename(damaged_path)


def no_intact_checkpoint_error(found: list[CheckpointDamaged]) -> ConfigError:
    """Return the error for a run whose checkpoints are all damaged."""
    hint = "is damaged, and no other checkpoint is left; restore one, or start over with --fresh"
    return ConfigError(Problem("checkpoint", str(damaged), hint) for damaged in found)


def _size(path: Path) -> int:
    """Return the bytes of the files in a directory."""
    return sum(file.stat().st_size for file in path.iterdir())


def _remove(path: Path) -> None:
    """Remove a checkpoint, renaming it first so that a crash half way leaves no complete-looking name."""
    if path.exists():
        old = path.with_name(path.name + ".old")
        path.rename(old)
        shutil.rmtree(old)
