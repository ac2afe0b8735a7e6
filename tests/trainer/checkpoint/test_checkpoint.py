"""An opened checkpoint: all damage is found before anything is used."""

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from shoestring import __version__
from shoestring.tests.launch.refusals import refused
from shoestring.tests.trainer.checkpoint.small_store import pieces, save
from shoestring.trainer.checkpoint.manifest import (
    CheckpointDamaged,
    read_manifest,
    read_manifest_summary,
)
from shoestring.trainer.checkpoint.store import CheckpointStore


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("file", "harm", "message"),
    [
        ("part_00000.safetensors", truncate, "bytes instead of"),
        ("part_00000.safetensors", flip_bit, "the SHA-256 of c is not that in the manifest"),
        ("part_00000.safetensors", Path.unlink, "is missing"),
        ("manifest.json", flip_bit, "its SHA-256 is not that in complete"),
        ("manifest.json", truncate, "its SHA-256 is not that in complete"),
        ("manifest.json", Path.unlink, "is missing"),
        ("complete", Path.unlink, "is missing"),
        ("complete", flip_bit, "its SHA-256 is not that in complete"),
        ("note.txt", flip_bit, "its SHA-256 is not that in the manifest"),
    ],
)
def test_every_damage_is_found_and_named(tmp_path: Path, file: str, harm: Callable[[Path], None], message: str) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    save(store, 1)
    harm(tmp_path / "step_00000001" / file)
    with pytest.raises(CheckpointDamaged, match=message) as damaged:
        raise CheckpointDamaged("; ".join(store.open(1).find_damage()))
    assert file in str(damaged.value)


def test_another_format_is_refused_and_not_taken_for_damage(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    with patch("shoestring.trainer.checkpoint.manifest.FORMAT_VERSION", 5):
        save(store, 1)
    assert "reads checkpoint format 4; use the version that wrote it" in refused(store.open, 1).popitem()[1]


MANIFEST_OF_FORMAT_3 = (
    '{"format":3,"facts":{"step":1,"consumed_samples":16,"owes_evaluation":false},"files":{"part_00000.safetensors":72},'
    '"attachments":[],"tensors":{"a":["F32",[2],[["part_00000.safetensors",64,0,2,"' + "0" * 64 + '"]]]}}'
)
"""Manifest as version 0.1.0 wrote it, before the names of this format."""


@pytest.mark.parametrize("read", [read_manifest, partial(read_manifest, check_sizes=False), read_manifest_summary])
def test_a_checkpoint_of_the_format_before_is_refused_in_one_sentence(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    (tmp_path / "manifest.json").write_text(MANIFEST_OF_FORMAT_3)
    (tmp_path / "complete").write_text(hashlib.sha256(MANIFEST_OF_FORMAT_3.encode()).hexdigest() + "\n")
    assert refused(read, tmp_path) == {
        f"{tmp_path}/manifest.json: format": f"3: Shoestring {__version__} reads checkpoint format 4; "
        "use the version that wrote it, or start a new run in another directory"
    }


def test_a_tensor_that_is_not_there_or_another_is_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    save(store, 1)
    for wrong, message in [
        ({"d": torch.zeros(2)}, "holds no tensor d"),
        ({"a": torch.zeros(5, 3)}, r"a is torch.float32 \[3, 5\] instead of torch.float32 \[5, 3\]"),
        ({"a": torch.zeros(3, 5, dtype=torch.float64)}, "instead of torch.float64"),
    ]:
        with pytest.raises(CheckpointDamaged, match=message):
            store.open(1).fill_piece(*pieces(wrong))
