"""A small checkpoint with a tokenizer, and damage to its files."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoestring.trainer.model.config import ModelConfig
from shoestring.trainer.model.model import Model, initialize_weights

SHAPE = ModelConfig(
    hidden_size=16,
    num_hidden_layers=2,
    vocab_size=300,
    n_routed_experts=8,
    moe_intermediate_size=8,
    intermediate_size=16,
    initializer_range=0.2,
)
TEXT = " ".join(f"word{index * 7919 % 211}" for index in range(2000))


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("/not/mounted/file")


def part(run: Path) -> Path:
    (found,) = (run / "checkpoints" / "step_00000004").glob("part_*.safetensors")
    return found


def reseal(checkpoint: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = checkpoint / "manifest.json"
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))
    (checkpoint / "complete").write_text(hashlib.sha256(path.read_bytes()).hexdigest())


def model(seed: int) -> Model:
    made = Model(SHAPE)
    initialize_weights(made, seed)
    return made


def flip_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
