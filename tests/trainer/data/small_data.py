"""Refusals of a small prepared directory, edits of its manifest and parts, and shards without files."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from shoestring.comm.errors import ConfigError
from shoestring.trainer.data.prepared import open_prepared_directory, verify_before_run
from shoestring.trainer.data.shards import TokenSplit


def refusal(act: Callable[[Path], object], directory: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        act(directory)
    return str(caught.value)


def edit_manifest(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "manifest.json"
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))


def edit_parts(directory: Path, edit: Callable[[list[dict[str, Any]]], object]) -> None:
    """Edit the list of parts, with hash and size as if its writer had made it so."""
    (path,) = directory.glob("parts-*.jsonl")
    parts = [json.loads(line) for line in path.read_text().splitlines()]
    edit(parts)
    raw = "".join(json.dumps(part) + "\n" for part in parts).encode()
    path.write_bytes(raw)
    changed = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    edit_manifest(directory, lambda tree: tree["parts"].update(changed))


def shard(directory: Path, split: str, number: int = 0) -> Path:
    """Return a shard of the only part of a split."""
    (path,) = directory.glob(f"*.{split}.{number:05d}.bin")
    return path


def verify_for_launch(directory: Path) -> None:
    verify_before_run(directory, open_prepared_directory(directory), first_machine=True)


@dataclass(frozen=True)
class InMemory:
    """Shards without files."""

    shards: Sequence[npt.NDArray[np.uint16]]

    def read_tokens(self, number: int, first: int, count: int) -> npt.NDArray[np.uint16]:
        return self.shards[number][first : first + count]


def split_in_memory(name: str, shards: Sequence[npt.NDArray[np.uint16]]) -> TokenSplit:
    """Return a split of shards of any lengths."""
    return TokenSplit(name, [0, *accumulate(len(each) for each in shards)], InMemory(shards))
