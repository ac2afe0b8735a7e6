"""The checkpoints of one run in a directory: written beside, then renamed, so that no half of one is picked up."""

from __future__ import annotations

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
_ROOM_BESIDE = 2**20
"""Bytes of the manifest and the other files of a checkpoint, and of what a run writes while it is saved."""


@dataclass(frozen=True)
class CheckpointExtras:
    """What a checkpoint holds beside tensors."""

    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON."""
    attachments: Mapping[str, bytes] = field(default_factory=dict)
    """Files by name."""
    required_tensors: frozenset[str] = frozenset()
    """Tensors without which it would not be whole."""


def parse_checkpoint_step(path: Path) -> int | None:
    """The step of a checkpoint that was saved to its end, by the name of its directory; None for any other name."""
    found = _NAME.fullmatch(path.name)
    return None if found is None else int(found.group(1))


@dataclass(frozen=True)
class CheckpointStore:
    """Where the checkpoints are, and how many of them stay."""

    directory: Path
    keep_last: int

    def steps(self) -> list[int]:
        """Steps of the checkpoints that were saved to their end, oldest first. They may have been damaged since."""
        if not self.directory.is_dir():
            return []
        return sorted(step for step in map(parse_checkpoint_step, self.directory.iterdir()) if step is not None)

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint of `step` is, or would be."""
        return self.directory / f"step_{step:08d}"

    def partial_path(self, step: int) -> Path:
        """Where it is while it is written."""
        return self.directory / f"step_{step:08d}.partial"

    def open(self, step: int) -> Checkpoint:
        """Raises `CheckpointDamaged`."""
        return Checkpoint.open(self.checkpoint_path(step))

    def open_last_intact(self) -> tuple[Checkpoint | None, list[CheckpointDamaged]]:
        """The newest checkpoint that looks whole from outside, and what is wrong with those after it."""
        found: list[CheckpointDamaged] = []
        for step in reversed(self.steps()):
            try:
                return self.open(step), found
            except CheckpointDamaged as damaged:
                found.append(damaged)
        return None, found

    def remove_partial_saves(self) -> None:
        """On one rank: remove what saves have left that a crash has ended. Raises `OSError`."""
        for pattern in ("step_*.partial", "step_*.old"):
            for leftover in self.directory.glob(pattern):
                shutil.rmtree(leftover)

    def prepare_save(self, step: int, size: int = 0) -> str | None:
        """On one rank: make room for a checkpoint whose tensors have `size` bytes, without what crashes have left.

        Where the disk has no room for one more beside those that stay, the ones that would go after this save go before
        it: then the return value says so. The newest one always stays. Raises `OSError`, also where there is no room
        even so, and where the directory that holds all checkpoints of the run is gone.
        """
        self.directory.mkdir(exist_ok=True)
        self.remove_partial_saves()
        removed = self._make_room(size)
        self.partial_path(step).mkdir()
        fsync_directory(self.directory)
        if not removed:
            return None
        what = " and ".join(f"that of step {old}" for old in removed)
        return f"{what} was removed before the checkpoint of step {step} was written: there was no room for both"

    def _make_room(self, size: int) -> list[int]:
        """Remove the oldest checkpoints that need not stay until `size` bytes, and some to spare, are free.

        Returns their steps. None is removed where that would not be enough, or where the newest one is not whole.
        """
        needed = size + size // 64 + _ROOM_BESIDE
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
        words = f"a checkpoint takes {size:,} bytes, {spare:,} more are kept free, and {self._free():,} are free"
        raise OSError(errno.ENOSPC, f"No space left: {words}")

    def _is_damaged(self, step: int) -> bool:
        try:
            self.open(step)
        except CheckpointDamaged:
            return True
        return False

    def _free(self) -> int:
        """Bytes that the disk has for this user. A quota is not known here: then the save itself fails."""
        return shutil.disk_usage(self.directory).free

    def commit_save(self, step: int, cover: CheckpointExtras) -> Path:
        """On one rank, when all have written: make the partial checkpoint a checkpoint.

        After it returns the checkpoint survives any crash. Raises `OSError`, and `ValueError` where what the ranks have
        written is not the whole state.
        """
        partial, final = self.partial_path(step), self.checkpoint_path(step)
        records = sorted(partial.glob("part_*.json"))
        entries = [write_file_durably(partial / name, raw) for name, raw in cover.attachments.items()]
        manifest = merge_rank_records((json.loads(path.read_text()) for path in records), cover.metadata, entries)
        if missing := sorted(cover.required_tensors - manifest.tensors.keys()):
            raise ValueError(f"no rank has saved {missing[0]}, and {len(missing) - 1} more")
        text = manifest.to_json().encode()
        write_file_durably(partial / MANIFEST_FILE, text)
        write_file_durably(partial / COMPLETE_MARKER_FILE, f"{hashlib.sha256(text).hexdigest()}\n".encode())
        for path in records:
            path.unlink()
        fsync_directory(partial)
        _remove(final)  # of an earlier life that went on from before this step
        partial.rename(final)
        fsync_directory(self.directory)
        return final

    def remove_oldest(self) -> None:
        """On one rank, after `commit`: remove the oldest. What cannot be removed is tried again the next time."""
        with suppress(OSError):
            for old in self.steps()[: -self.keep_last]:
                _remove(self.checkpoint_path(old))

    def discard_partial_save(self, step: int) -> None:
        """On one rank: free what a save has taken that cannot be finished."""
        shutil.rmtree(self.partial_path(step), ignore_errors=True)

    def rename_damaged(self, step: int) -> Path:
        """On one rank: rename a damaged checkpoint, so that no run looks at it again and it can be looked into."""
        aside = self.checkpoint_path(step).with_suffix(".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        return self.checkpoint_path(step).rename(aside)


def no_intact_checkpoint_error(found: list[CheckpointDamaged]) -> ConfigError:
    """When no checkpoint of a run is left to go on from."""
    hint = "is damaged, and no other checkpoint is left; restore one, or start over with --fresh"
    return ConfigError(Problem("checkpoint", str(damaged), hint) for damaged in found)


def _size(path: Path) -> int:
    """Bytes of the files in a directory."""
    return sum(file.stat().st_size for file in path.iterdir())


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a crash half way leaves no name that counts as whole."""
    if path.exists():
        old = path.with_name(path.name + ".old")
        path.rename(old)
        shutil.rmtree(old)
