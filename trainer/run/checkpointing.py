"""A run and its checkpoints: what one holds, when it is saved, and which one a run goes on from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from ... import __version__
from ...comm.errors import ConfigError, Problem, raise_if_any
from ...comm.groups import Group
from ..build import RankResources
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.compatibility import compute_dtype_problems, resume_problems, start_from_problems
from ..checkpoint.find import find_checkpoint
from ..checkpoint.manifest import CheckpointDamaged
from ..checkpoint.pieces import MODEL_STATE, TensorPiece, whole_tensor_pieces
from ..checkpoint.saver import SaveResult
from ..checkpoint.store import CheckpointExtras, CheckpointStore, no_intact_checkpoint_error
from ..checkpoint.training_state import rng_state_name
from ..structured_config import restore_interpolations
from .exit import RunFailed
from .reporter import Reporter, charge_time

T = TypeVar("T")


def remove_partial_saves(store: CheckpointStore) -> None:
    """On one rank of a run, before it writes anything of its own: free what an earlier launch has left half written.

    What cannot be removed is left to the next save, which says so.
    """
    with suppress(OSError):
        store.remove_partial_saves()


def reserve_save_memory(rank: RankResources) -> None:
    """Find memory for the copies that saves make, beside the first steps."""
    rank.checkpoint_saver.reserve_memory(_state(rank))


def begin_save(rank: RankResources, step: int, reporter: Reporter | None, *, evaluation_pending: bool = False) -> None:
    """Save the state after `step` steps: return when it is copied, and the save before has ended."""
    finish_save(rank, reporter)
    metadata: dict[str, Any] = {
        "version": __version__,
        "step": step,
        "consumed_samples": rank.config.batch_ramp.consumed_samples(step),
        "evaluation_pending": evaluation_pending,
    }
    attachments = {}
    if reporter is not None:
        metadata |= {
            "config": restore_interpolations(asdict(rank.config)),
            "compute": str(rank.dtype),
            "ledger": reporter.ledger_totals(),
        }
        metadata |= {"data": rank.data_manifest.content_hash, "tokenizer": rank.data_manifest.tokenizer.sha256}
        attachments[rank.data_manifest.tokenizer.file] = rank.tokenizer.to_json().encode()
    with charge_time(reporter, "checkpoint_save"):
        rank.checkpoint_saver.begin_save(
            step, _state(rank), CheckpointExtras(metadata, attachments, rank.checkpoint_tensor_names)
        )


def poll_save(rank: RankResources, reporter: Reporter | None, done: int, failed: int) -> None:
    """Once a step: tell how the save under way has ended, if it has; see `Saver.poll_save`."""
    _tell(rank.checkpoint_saver.poll_save(done, failed), reporter)


def finish_save(rank: RankResources, reporter: Reporter | None) -> SaveResult | None:
    """Wait for the save under way, if there is one, and tell how it has ended."""
    if not rank.checkpoint_saver.is_saving:
        return None
    with charge_time(reporter, "checkpoint_save"):
        saved = rank.checkpoint_saver.finish_save()
    _tell(saved, reporter)
    return saved


def load_latest_checkpoint(rank: RankResources, reporter: Reporter | None) -> dict[str, Any] | None:
    """Fill the rank's state from the newest checkpoint that is whole; return its metadata, or None where there is none.

    Newer ones that are damaged are named and set aside. Raises `ConfigError` for a checkpoint that does not fit the
    configuration and where all are damaged, `RunFailed` where one cannot be read. A run without any begins with the
    weights of `training.start_from`.
    """
    steps = rank.groups.world_cpu.all_gather_objects(rank.checkpoint_store.steps(), "which checkpoints there are")[0]
    if steps:
        with charge_time(reporter, "checkpoint_load"):
            return _load_newest(rank, steps, reporter)
    if rank.config.training.start_from is not None:
        _start_from(rank, Path(rank.config.training.start_from), reporter)
    return None


def _load_newest(rank: RankResources, steps: list[int], reporter: Reporter | None) -> dict[str, Any]:
    world, store = rank.groups.world_cpu, rank.checkpoint_store
    damaged: dict[int, CheckpointDamaged] = {}
    for step in reversed(steps):
        try:
            checkpoint = _agreed(world, partial(store.open, step))
            raise_if_any(resume_problems(checkpoint.manifest.metadata, rank.config, rank.data_manifest))
            raise_if_any(compute_dtype_problems(checkpoint.manifest.metadata, rank.dtype))
            _agreed(world, partial(_fill, rank, checkpoint))
        except CheckpointDamaged as found:
            damaged[step] = found
            continue
        rank.stepper.optimizer.step_count = step
        rank.stepper.optimizer.all_gather_weights()
        if reporter is not None:
            for newer, why in damaged.items():
                aside = store.rename_damaged(newer).name
                text = f"the checkpoint of step {newer} is damaged and now called {aside}: {why}"
                reporter.warn(step, f"{text}; the run goes on from step {step}")
        return dict(checkpoint.manifest.metadata)
    raise no_intact_checkpoint_error(list(damaged.values()))


def _start_from(rank: RankResources, path: Path, reporter: Reporter | None) -> None:
    """Weights and routing biases alone. Raises `ConfigError`."""
    checkpoint = find_checkpoint(path)
    raise_if_any(start_from_problems(checkpoint, rank.config, rank.data_manifest))

    def fill() -> None:
        for piece in rank.local_checkpoint_pieces():
            if piece.name.startswith(f"{MODEL_STATE}/"):
                checkpoint.fill_piece(piece)

    try:
        _agreed(rank.groups.world_cpu, fill)
    except CheckpointDamaged as damaged:
        hint = "is damaged; name another checkpoint"
        raise ConfigError([Problem("training.start_from", str(damaged), hint)]) from damaged
    rank.stepper.optimizer.all_gather_weights()
    if rank.stepper.ema is not None:
        rank.stepper.ema.reset()
    if reporter is not None:
        reporter.report_initial_weights(checkpoint.path)


def _fill(rank: RankResources, checkpoint: Checkpoint) -> None:
    for piece in rank.local_checkpoint_pieces():
        checkpoint.fill_piece(piece)
    if checkpoint.missing_tensors([rng_state_name(rank.groups.rank)]):  # saved by fewer ranks
        torch.manual_seed(rank.config.training.seed + rank.groups.rank)
    else:
        torch.set_rng_state(checkpoint.read_tensor(rng_state_name(rank.groups.rank)))


def _state(rank: RankResources) -> list[TensorPiece]:
    number = rank.groups.rank
    return [
        *rank.local_checkpoint_pieces(),
        *whole_tensor_pieces(rng_state_name(number), torch.get_rng_state(), (number,)),
    ]


def _agreed(world: Group, function: Callable[[], T]) -> T:
    """`function()`. Raises `CheckpointDamaged` on every rank if it does on any, `RunFailed` where a file cannot be read now."""
    failure: CheckpointDamaged | OSError | None = None
    try:
        result = function()
    except (CheckpointDamaged, OSError) as error:
        failure = error
    kinds = torch.tensor([isinstance(failure, kind) for kind in (CheckpointDamaged, OSError)], dtype=torch.int64)
    damaged, unreadable = world.all_reduce_sum(kinds, "whether a checkpoint is whole").tolist()
    if damaged or unreadable:
        words = world.all_gather_objects(None if failure is None else str(failure), "why a checkpoint is not whole")
        reason = next(each for each in words if each)
        if unreadable:
            hint = "nothing was changed: when it can be read again, the same command goes on"
            raise RunFailed(f"a checkpoint cannot be read ({reason}); {hint}")
        raise CheckpointDamaged(reason)
    return result


def _tell(saved: SaveResult | None, reporter: Reporter | None) -> None:
    if saved is not None and reporter is not None:
        reporter.report_checkpoint(saved)
