"""Refusals of a small prepared directory, edits of its manifest, and shards without files."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from shoestring.comm.errors import ConfigError
from shoestring.trainer.data.prepared import open_prepared_directory, verify_before_run


def refusal(act: Callable[[Path], object], directory: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        act(directory)
    return str(caught.value)


def edit_manifest(directory: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = directory / "manifest.json"
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))


def verify_for_launch(directory: Path) -> None:
    verify_before_run(directory, open_prepared_directory(directory).manifest, first_machine=True)


@dataclass(frozen=True)
class InMemory:
    """Shards without files."""

    shards: Sequence[npt.NDArray[np.uint16]]

    def read_tokens(self, number: int, first: int, count: int) -> npt.NDArray[np.uint16]:
        return self.shards[number][first : first + count]
