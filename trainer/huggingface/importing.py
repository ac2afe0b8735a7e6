"""From a directory of released weights to a checkpoint of weights and routing biases, some tensors at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...comm.refusal import Problem, Refused, refuse_if_any
from ..checkpoint.pieces import Piece
from ..checkpoint.saver import write_share
from ..checkpoint.store import CheckpointStore, Cover
from ..checkpoint.tensor_file import TensorFile
from ..model.config import ModelConfig
from .blocks import dequantise_blocks, scales_of
from .config import model_config
from .export import INDEX
from .names import SCALE, Entry, entries, to_pairs
from .tokenizer import CARRIED

_BATCH_BYTES = 256 * 2**20
"""Of FP32 weights that are collected for one file of the checkpoint."""
_MOST_PROBLEMS = 8
_IGNORED = ("rotary_emb.inv_freq",)
"""Ends of names that old files hold and that follow from the configuration."""


@dataclass(frozen=True)
class Released:
    """The tensors of a directory, by name, in whichever files they are."""

    directory: Path
    files: Mapping[str, TensorFile]
    """By the name of a tensor."""

    @staticmethod
    def open(directory: Path) -> Released:
        """Read the headers. Raises `Refused` for files that are missing or no safetensors."""
        paths = [directory / "model.safetensors"]
        if (directory / INDEX).exists():
            paths = [directory / file for file in sorted(set(_json(directory / INDEX)["weight_map"].values()))]
        problems: list[Problem] = []
        files: dict[str, TensorFile] = {}
        for path in paths:
            try:
                file = TensorFile(path)
                files |= dict.fromkeys(file.tensors, file)
            except (OSError, ValueError, KeyError, TypeError) as error:
                problems.append(Problem(str(path), str(error), "cannot be read; fetch it again"))
        refuse_if_any(problems)
        return Released(directory, files)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of a tensor, or None where there is none."""
        return self.files[name].tensors[name].shape if name in self.files else None

    def read(self, name: str) -> Tensor:
        """A weight in FP32, whatever it is stored in."""
        tensor = self.files[name].read(name)
        if name + SCALE in self.files:
            return dequantise_blocks(tensor, self.files[name + SCALE].read(name + SCALE))
        return tensor.to(torch.float32)


def import_released(source: Path, target: Path, say: Callable[[str], None]) -> Path:
    """Make `target` hold the weights of `source` as the checkpoint of step 0; return its path.

    Raises `Refused`, before anything is written, with everything that is missing, has another shape, or is not known.
    """
    store = CheckpointStore(target, keep=1)
    if store.steps():
        raise Refused([Problem("target", str(target), "holds checkpoints already; name another directory")])
    if not (source / "config.json").is_file():
        raise Refused([Problem("source", str(source), "holds no config.json; name a directory of released weights")])
    tree = _json(source / "config.json")
    released = Released.open(source)
    config = _with_the_mtp_that_is_there(model_config(tree, source.resolve().name), released, say)
    planned = entries(config)
    _refuse_briefly(list(_misfits(planned, released)), source)
    rope_interleave = tree.get("rope_interleave", True) is not False
    target.mkdir(parents=True, exist_ok=True)
    store.prepare(0)
    for number, batch in enumerate(_batches(planned)):
        pieces = [_piece(entry, released, rope_interleave=rope_interleave) for entry in batch]
        write_share(store.partial(0), f"part_{number:05d}", pieces)
        say(f"{sum(piece.bytes for piece in pieces):,} bytes, up to {batch[-1].name}")
    attachments = {name: (source / name).read_bytes() for name in CARRIED if (source / name).is_file()}
    facts: dict[str, Any] = {"step": 0, "config": {"model": asdict(config)}, "source": tree}
    return store.commit(0, Cover(facts, attachments, frozenset(entry.name for entry in planned)))


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Refused([Problem(str(path), str(error), "cannot be read; fetch it again")]) from error
    if not isinstance(tree, dict):
        raise Refused([Problem(str(path), type(tree).__name__, "must be a mapping; fetch it again")])
    return tree


def _with_the_mtp_that_is_there(config: ModelConfig, released: Released, say: Callable[[str], None]) -> ModelConfig:
    """Transformers writes the number of MTP modules and not their weights."""
    beyond = tuple(f"model.layers.{config.layers + depth}." for depth in range(config.mtp_depth))
    if config.mtp_depth and not any(name.startswith(beyond) for name in released.files):
        say(f"config.json tells of {config.mtp_depth} MTP modules and no file holds their weights: imported without")
        return replace(config, mtp_depth=0)
    return config


def _refuse_briefly(problems: list[Problem], source: Path) -> None:
    """A large model has a hundred thousand tensors, and a wrong number in config.json may make all of them wrong."""
    if len(problems) > _MOST_PROBLEMS:
        remedy = "problems of the same kind: config.json and files do not belong together"
        problems = [*problems[:_MOST_PROBLEMS], Problem(str(source), f"{len(problems) - _MOST_PROBLEMS} more", remedy)]
    refuse_if_any(problems)


def _misfits(planned: list[Entry], released: Released) -> Iterator[Problem]:
    known = set()
    for entry in planned:
        for name in (*entry.released, *entry.copies):
            known |= {name, name + SCALE}
            shape = released.shape(name)
            if shape is None and name in entry.released:
                yield Problem(name, None, "is in no file of the directory")
            elif shape not in (None, entry.part_shape):
                yield Problem(name, list(shape or ()), f"must have the shape {list(entry.part_shape)} by config.json")
            scale = released.shape(name + SCALE)
            if scale is not None and scale != scales_of(entry.part_shape):
                remedy = f"must have the shape {list(scales_of(entry.part_shape))}, a scale for each block"
                yield Problem(name + SCALE, list(scale), remedy)
            is_fp8 = shape is not None and released.files[name].tensors[name].dtype.itemsize == 1
            if is_fp8 and scale is None:
                yield Problem(name + SCALE, None, "is in no file of the directory, and the weight is FP8")
        yield from _different_copies(entry, released)
    for name in released.files:
        if name not in known and not name.endswith(_IGNORED):
            yield Problem(name, list(released.shape(name) or ()), "is no part of this model by config.json")


def _different_copies(entry: Entry, released: Released) -> Iterator[Problem]:
    """MTP modules share embedding and head with the main model; the files repeat them."""
    here = [name for name in entry.copies if released.shape(name) == entry.part_shape]
    if here and released.shape(entry.released[0]) == entry.part_shape:
        main = released.read(entry.released[0])
        for name in here:
            if not torch.equal(released.read(name), main):
                yield Problem(name, "other values", f"must equal {entry.released[0]}: our MTP modules share it")


def _batches(planned: list[Entry]) -> Iterator[list[Entry]]:
    batch: list[Entry] = []
    size = 0
    for entry in planned:
        batch.append(entry)
        size += 4 * torch.Size(entry.shape).numel()
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _piece(entry: Entry, released: Released, *, rope_interleave: bool) -> Piece:
    tensor = torch.cat([released.read(name) for name in entry.released])
    if entry.rotated is not None and not rope_interleave:
        tensor = to_pairs(tensor, entry.rotated)
    return Piece(entry.name, entry.shape, 0, tensor.reshape(-1), (0,))
