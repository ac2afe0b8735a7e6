"""Saving a run's state in checkpoints, and resuming from the newest one that is intact."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from ... import __version__
from ...comm.errors import raise_if_any
from ...comm.groups import Group
from ..build import RankResources
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.compatibility import compute_dtype_problems, resume_problems, start_from_problems
from ..checkpoint.find import find_checkpoint
from ..checkpoint.manifest import CheckpointDamaged, damage_error_context
from ..checkpoint.pieces import MODEL_STATE, TensorPiece, whole_tensor_pieces
from ..checkpoint.saver import SaveResult
from ..checkpoint.store import CheckpointExtras, CheckpointStore, no_intact_checkpoint_error
from ..checkpoint.training_state import rng_state_name
from ..structured_config import restore_interpolations
from .exit import RunFailed
from .reporter import Reporter

T = TypeVar("T")


def remove_partial_saves(store: CheckpointStore) -> None:
    """Remove the partial checkpoints of earlier launches. Called on one rank, before the run writes anything.

    An `OSError` is suppressed: the next save meets the same files and reports it.
    """
    with suppress(OSError):
        store.remove_partial_saves()


def reserve_save_memory(rank: RankResources) -> None:
    """Allocate the memory that saves copy the state to, while the first steps run."""
    rank.checkpoint_saver.reserve_memory(_state(rank))


def begin_save(rank: RankResources, step: int, reporter: Reporter, *, evaluation_pending: bool = False) -> None:
    """Start to save the state after `step` steps; return when it is copied, after the previous save has ended."""
    # One save at a time: the host buffer holds one copy of this rank's share of the state.
    finish_save(rank, reporter)
    metadata: dict[str, Any] = {
        "version": __version__,
        "step": step,
        "consumed_samples": rank.config.batch_ramp.consumed_samples(step),
        "evaluation_pending": evaluation_pending,
    }
    attachments: dict[str, bytes] = {}
    # Rank 0 alone writes the manifest, so the other ranks need none of this.
    if rank.groups.world.is_first_rank:
        metadata |= {
            "config": restore_interpolations(asdict(rank.config)),
            "compute": str(rank.dtype),
            "ledger": reporter.ledger_totals(),
        }
        metadata |= {"data": rank.data_manifest.content_hash, "tokenizer": rank.data_manifest.tokenizer.sha256}
        metadata["eos_token_id"] = rank.tokenizer.eos_token_id
        attachments |= rank.tokenizer.files
    with reporter.charge_time("checkpoint_save"):
        rank.checkpoint_saver.begin_save(
            step, _state(rank), CheckpointExtras(metadata, attachments, rank.checkpoint_tensor_names)
        )


def poll_save(rank: RankResources, reporter: Reporter, done: int, failed: int) -> None:
    """Report the result of the save in flight if it has ended; called once per step (`CheckpointSaver.poll_save`)."""
    _report(rank.checkpoint_saver.poll_save(done, failed), reporter)


def finish_save(rank: RankResources, reporter: Reporter) -> SaveResult | None:
    """Wait for the save in flight, if there is one; report and return its result."""
    if not rank.checkpoint_saver.is_saving:
        return None
    with reporter.charge_time("checkpoint_save"):
        saved = rank.checkpoint_saver.finish_save()
    _report(saved, reporter)
    return saved


def load_latest_checkpoint(rank: RankResources, reporter: Reporter) -> dict[str, Any] | None:
    """Load the newest intact checkpoint into the rank's state; return its metadata, or None if there is no checkpoint.

    Damaged newer checkpoints are reported and renamed. Raises `ConfigError` if the checkpoint does not fit the
    configuration or all are damaged, `RunFailed` if one cannot be read. A run without a checkpoint loads the weights
    of `training.start_from`, if set.
    """
    # Rank 0's list decides, so that all ranks try the same checkpoints in the same order.
    steps = rank.groups.world_cpu.all_gather_objects(rank.checkpoint_store.steps(), "which checkpoints there are")[0]
    if steps:
        with reporter.charge_time("checkpoint_load"):
            return _load_newest(rank, steps, reporter)
    if rank.config.training.start_from is not None:
        _start_from(rank, Path(rank.config.training.start_from), reporter)
    return None


def _load_newest(rank: RankResources, steps: list[int], reporter: Reporter) -> dict[str, Any]:
    world, store = rank.groups.world_cpu, rank.checkpoint_store
    damaged: dict[int, CheckpointDamaged] = {}
    for step in reversed(steps):
        try:
            checkpoint = _run_on_all_ranks(world, partial(store.open, step))
            raise_if_any(resume_problems(checkpoint.manifest.metadata, rank.config, rank.data_manifest))
            raise_if_any(compute_dtype_problems(checkpoint.manifest.metadata, rank.dtype))
            _run_on_all_ranks(world, partial(_fill, rank, checkpoint))
        except CheckpointDamaged as found:
            # _run_on_all_ranks raises on all ranks together, so all of them try the same older checkpoint next.
            damaged[step] = found
            continue
        # AdamW's bias correction depends on the step count, which is no tensor of the checkpoint.
        rank.engine.stepper.optimizer.step_count = step
        # The masters are loaded; the weights that compute are cast from them and gathered.
        rank.engine.stepper.optimizer.all_gather_weights()
        if rank.groups.world.is_first_rank:
            for newer, why in damaged.items():
                new_name = store.rename_damaged(newer).name
                text = f"the checkpoint of step {newer} is damaged and was renamed to {new_name}: {why}"
                reporter.warn(step, f"{text}; the run resumes from step {step}")
        return dict(checkpoint.manifest.metadata)
    raise no_intact_checkpoint_error(list(damaged.values()))


def _start_from(rank: RankResources, path: Path, reporter: Reporter) -> None:
    """Load only weights and routing biases, without optimizer state. Raises `ConfigError`."""
    checkpoint = find_checkpoint(path)
    raise_if_any(start_from_problems(checkpoint, rank.config, rank.data_manifest))

    def fill() -> None:
        for piece in rank.local_checkpoint_pieces():
            if piece.name.startswith(f"{MODEL_STATE}/"):
                checkpoint.fill_piece(piece)

    with damage_error_context("is damaged; name another checkpoint", "training.start_from"):
        _run_on_all_ranks(rank.groups.world_cpu, fill)
    rank.engine.stepper.optimizer.all_gather_weights()
    if rank.engine.stepper.ema is not None:
        # The average restarts at the loaded weights, or it would mix in the random initial ones.
        rank.engine.stepper.ema.reset()
    reporter.report_initial_weights(checkpoint.path)


def _fill(rank: RankResources, checkpoint: Checkpoint) -> None:
    for piece in rank.local_checkpoint_pieces():
        checkpoint.fill_piece(piece)
    if checkpoint.missing_tensors([rng_state_name(rank.groups.rank)]):  # saved by fewer ranks
        # A seed per rank, as at the start of a run.
        torch.manual_seed(rank.config.training.seed + rank.groups.rank)
    else:
        torch.set_rng_state(checkpoint.read_tensor(rng_state_name(rank.groups.rank)))


def _state(rank: RankResources) -> list[TensorPiece]:
    number = rank.groups.rank
    return [
        *rank.local_checkpoint_pieces(),
        *whole_tensor_pieces(rng_state_name(number), torch.get_rng_state(), (number,)),
    ]


def _run_on_all_ranks(world: Group, function: Callable[[], T]) -> T:
    """Return `function()`; raise the same error on every rank if any rank fails.

    Raises `CheckpointDamaged` where the content is wrong, `RunFailed` where a file cannot be read now.
    """
    failure: CheckpointDamaged | OSError | None = None
    try:
        result = function()
    except (CheckpointDamaged, OSError) as error:
        failure = error
    # Two flags first: the reasons, which are pickled, travel only if a rank has failed.
    kinds = torch.tensor([isinstance(failure, kind) for kind in (CheckpointDamaged, OSError)], dtype=torch.int64)
    damaged, unreadable = world.all_reduce_sum(kinds, "whether a checkpoint is whole").tolist()
    if damaged or unreadable:
        failures = world.all_gather_objects(None if failure is None else str(failure), "why a checkpoint is not whole")
        reason = next(each for each in failures if each)
        # An unreadable file may be whole (a file server that is down): falling back to an older checkpoint would
        # lose steps, and renaming the new one would hide it.
        if unreadable:
            hint = "nothing was changed: when it can be read again, the same command resumes"
            raise RunFailed(f"a checkpoint cannot be read ({reason}); {hint}")
        raise CheckpointDamaged(reason)
    return result


def _report(saved: SaveResult | None, reporter: Reporter) -> None:
    if saved is not None:
        reporter.report_checkpoint(saved)
