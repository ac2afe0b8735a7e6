"""A store of checkpoints of three small tensors, saved by one rank."""

from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from shoestring.comm.groups import Group
from shoestring.trainer.checkpoint.pieces import TensorPiece, whole_tensor_pieces
from shoestring.trainer.checkpoint.saver import CheckpointSaver, SaveResult
from shoestring.trainer.checkpoint.store import CheckpointExtras, CheckpointStore

WORLD = Group((0,), None, 0, timedelta(seconds=1))


def tensors(value: float = 1.0) -> dict[str, Tensor]:
    return {
        "a": torch.full((3, 5), value),
        "b": torch.full((7,), value, dtype=torch.bfloat16),
        "c": torch.tensor(value),
    }


def pieces(state: dict[str, Tensor]) -> list[TensorPiece]:
    return [piece for name, tensor in state.items() for piece in whole_tensor_pieces(name, tensor, (0,))]


def save(store: CheckpointStore, step: int, state: dict[str, Tensor] | None = None) -> SaveResult | None:
    saver = CheckpointSaver(store, WORLD)
    saver.begin_save(
        step, pieces(tensors() if state is None else state), CheckpointExtras({"step": step}, {"note.txt": b"words"})
    )
    saved = saver.finish_save()
    saver.close()
    return saved


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
