"""Pieces of tensors: from any sharding into any other, and pieces that no rank has saved."""

from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.tests.processes import World, run_processes
from shoestring.tests.trainer.checkpoint.small_store import WORLD, names
from shoestring.trainer.checkpoint.pieces import (
    EXP_AVG,
    MODEL_STATE,
    StateSlice,
    TensorPiece,
    pieces_of_slice,
    pieces_to_write,
    whole_tensor_pieces,
)
from shoestring.trainer.checkpoint.saver import CheckpointSaver
from shoestring.trainer.checkpoint.store import CheckpointExtras, CheckpointStore


def slices(parameter: Tensor, ranks: int, rank: int) -> list[TensorPiece]:
    """Return a rank's runs of an expert stack that is sharded over `ranks`; they may end inside an expert."""
    flat = parameter.view(-1)
    size = -(-flat.numel() // ranks)
    part = StateSlice(EXP_AVG, "experts", rank * size, flat[rank * size : (rank + 1) * size])
    return list(pieces_of_slice(part, tuple(parameter.shape), 4, rank))


def save_slices(world: World, directory: str) -> list[str]:
    topology = Topology(edp=world.size)
    group = ProcessGroups.create(topology, world.rank, timedelta(seconds=30)).world
    saver = CheckpointSaver(CheckpointStore(Path(directory), keep_last=1), group)
    stack = torch.arange(5 * 6.0).view(5, 2, 3)
    shared = [
        piece
        for name in "abcdef"
        for piece in whole_tensor_pieces(f"{MODEL_STATE}/{name}", torch.full((4,), 1.0), tuple(range(world.size)))
    ]
    saver.begin_save(1, [*slices(stack, world.size, world.rank), *shared], CheckpointExtras())
    saved = saver.finish_save()
    saver.close()
    assert saved is not None
    assert saved.failure is None
    return [piece.name for piece in pieces_to_write(world.rank, shared)]


def test_slices_of_a_sharded_optimizer_fit_any_other_sharding(tmp_path: Path) -> None:
    written = run_processes(4, save_slices, str(tmp_path))
    assert sorted(name for own in written for name in own) == [f"{MODEL_STATE}/{name}" for name in "abcdef"]
    assert all(written)  # replicas share the work
    checkpoint = CheckpointStore(tmp_path, keep_last=1).open(1)
    stack = torch.arange(5 * 6.0).view(5, 2, 3)
    for expert, weights in enumerate(stack):
        assert torch.equal(checkpoint.read_tensor(f"exp_avg/experts/expert_{4 + expert:04d}"), weights)
    for ranks in (1, 3):
        loaded = torch.zeros_like(stack)
        for rank in range(ranks):
            for piece in slices(loaded, ranks, rank):
                checkpoint.fill_piece(piece)
        assert torch.equal(loaded, stack)


def save_a_hole(world: World, directory: str) -> str | None:
    """Save without the second rank's half."""
    group = ProcessGroups.create(Topology(edp=2), world.rank, timedelta(seconds=30)).world
    saver = CheckpointSaver(CheckpointStore(Path(directory), keep_last=1), group)
    names = frozenset(f"exp_avg/experts/expert_{expert:04d}" for expert in range(4, 8))
    saver.begin_save(
        1, slices(torch.ones(4, 2, 3), 2, 0) if world.rank == 0 else [], CheckpointExtras(required_tensors=names)
    )
    saved = saver.finish_save()
    saver.close()
    return None if saved is None else saved.failure


def test_experts_that_no_rank_has_saved_are_missed(tmp_path: Path) -> None:
    failure = "rank 0: no rank has saved exp_avg/experts/expert_0006, and 1 more"
    assert run_processes(2, save_a_hole, str(tmp_path)) == [failure] * 2
    assert names(tmp_path) == []


def test_half_a_tensor_is_missed(tmp_path: Path) -> None:
    saver = CheckpointSaver(CheckpointStore(tmp_path, keep_last=1), WORLD)
    saver.begin_save(1, slices(torch.ones(1, 5, 3), 2, 0), CheckpointExtras())
    assert (saved := saver.finish_save()) is not None
    assert saved.failure == "rank 0: exp_avg/experts/expert_0004: elements from 8 on were saved by no rank"
    saver.close()
