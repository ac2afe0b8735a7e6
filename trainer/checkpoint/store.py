"""Checkpoints in a directory: written beside, then renamed, so that a half-written one is never picked up."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ...comm.groups import Group
from ...comm.refusal import Problem, Refused
from ..data.files import sync_directory

_NAME = re.compile(r"step_(\d{8})")
_FACTS = "facts.json"


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run. Promise: after `save` returns on all ranks, the checkpoint survives any crash."""

    directory: Path
    keep: int

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self.directory.iterdir())
        return sorted(int(match.group(1)) for match in found if match)

    def save(self, step: int, state: Mapping[str, Tensor], facts: Mapping[str, Any], world: Group) -> Path:
        """Collective: write `state` (see `named_state`) and the JSON `facts`, then let the oldest checkpoints go."""
        final = self._path(step)
        partial = final.with_name(final.name + ".partial")
        if world.is_first:
            self._clear_leftovers()
            _remove(final)  # of an earlier life that went on from before this step
            partial.mkdir(parents=True)
            sync_directory(self.directory.parent)
        world.barrier("start of a checkpoint")
        with _quiet(), world.failing_clearly(f"saving the checkpoint of step {step}"):
            dcp.save(dict(state), checkpoint_id=partial, no_dist=world.handle is None, process_group=world.handle)
        if world.is_first:
            _write_durably(partial / _FACTS, json.dumps(facts, indent=1))
            sync_directory(partial)
            partial.rename(final)
            sync_directory(self.directory)
            for old in self.steps()[: -self.keep]:
                _remove(self._path(old))
        world.barrier("end of a checkpoint")
        return final

    def facts(self, step: int) -> dict[str, Any]:
        """The JSON facts of a checkpoint."""
        path = self._path(step) / _FACTS
        try:
            facts: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            remedy = f"cannot be read ({error}); remove {path.parent} to go on from the checkpoint before it"
            raise Refused([Problem("checkpoint", str(path), remedy)]) from error
        return facts

    def load(self, step: int, state: dict[str, Tensor], world: Group) -> None:
        """Collective: fill the tensors of `state` in place. Raises `Refused` for a damaged checkpoint."""
        path = self._path(step)
        try:
            with _quiet(), world.failing_clearly(f"loading the checkpoint of step {step}"):
                dcp.load(state, checkpoint_id=path, no_dist=world.handle is None, process_group=world.handle)
        except (CheckpointException, OSError) as error:
            remedy = f"cannot be read ({error}); remove it to go on from the checkpoint before it"
            raise Refused([Problem("checkpoint", str(path), remedy)]) from error

    def _clear_leftovers(self) -> None:
        """Remove what a crash in the middle of a save or of a removal has left."""
        for pattern in ("*.partial", "*.old"):
            for leftover in self.directory.glob(pattern):
                shutil.rmtree(leftover)

    def _path(self, step: int) -> Path:
        return self.directory / f"step_{step:08d}"


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a crash half way leaves no name that counts as whole."""
    if path.exists():
        old = path.with_name(path.name + ".old")
        path.rename(old)
        shutil.rmtree(old)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's remark that a single process saves alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
