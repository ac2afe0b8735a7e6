"""A run and its checkpoints: what one holds, when it is saved, and which one a run goes on from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from ...comm.errors import ConfigError, Problem, refuse_if_any
from ...comm.groups import Group
from ..build import Rank
from ..checkpoint.compatible import incompatibilities, other_dtype, start_problems
from ..checkpoint.find import find_checkpoint
from ..checkpoint.manifest import Damaged
from ..checkpoint.names import rng_name
from ..checkpoint.opened import Checkpoint
from ..checkpoint.pieces import MODEL, Piece, whole_pieces
from ..checkpoint.saver import Saved
from ..checkpoint.store import CheckpointExtras, CheckpointStore, refuse_damaged
from ..typed import as_written
from .exit import RunFailed
from .reporter import Reporter, timing

T = TypeVar("T")


def clear_leftovers(store: CheckpointStore) -> None:
    """On one rank of a run, before it writes anything of its own: free what an earlier launch has left half written.

    What cannot be removed is left to the next save, which says so.
    """
    with suppress(OSError):
        store.clear_leftovers()


def prepare_saves(rank: Rank) -> None:
    """Find memory for the copies that saves make, beside the first steps."""
    rank.saver.reserve(_state(rank))


def begin_save(rank: Rank, step: int, reporter: Reporter | None, *, owes_evaluation: bool = False) -> None:
    """Save the state after `step` steps: return when it is copied, and the save before has ended."""
    finish_save(rank, reporter)
    facts: dict[str, Any] = {"step": step, "consumed_samples": rank.config.batches.consumed(step)}
    facts["owes_evaluation"] = owes_evaluation
    attachments = {}
    if reporter is not None:
        facts |= {"config": as_written(asdict(rank.config)), "compute": str(rank.dtype), "ledger": reporter.totals()}
        facts |= {"data": rank.data.digest, "tokenizer": rank.data.tokenizer.sha256}
        attachments[rank.data.tokenizer.file] = rank.tokenizer.to_json().encode()
    with timing(reporter, "checkpoint_save"):
        rank.saver.begin(step, _state(rank), CheckpointExtras(facts, attachments, rank.state_names))


def poll_save(rank: Rank, reporter: Reporter | None, done: int, failed: int) -> None:
    """Once a step: tell how the save under way has ended, if it has; see `Saver.poll`."""
    _tell(rank.saver.poll(done, failed), reporter)


def finish_save(rank: Rank, reporter: Reporter | None) -> Saved | None:
    """Wait for the save under way, if there is one, and tell how it has ended."""
    if not rank.saver.is_saving:
        return None
    with timing(reporter, "checkpoint_save"):
        saved = rank.saver.finish()
    _tell(saved, reporter)
    return saved


def load_last(rank: Rank, reporter: Reporter | None) -> dict[str, Any] | None:
    """Fill the rank's state from the newest checkpoint that is whole; return its facts, or None where there is none.

    Newer ones that are damaged are named and set aside. Raises `ConfigError` for a checkpoint that does not fit the
    configuration and where all are damaged, `RunFailed` where one cannot be read. A run without any begins with the
    weights of `training.start_from`.
    """
    steps = rank.groups.control.all_gather_objects(rank.store.steps(), "which checkpoints there are")[0]
    if steps:
        with timing(reporter, "checkpoint_load"):
            return _load_newest(rank, steps, reporter)
    if rank.config.training.start_from is not None:
        _start_from(rank, Path(rank.config.training.start_from), reporter)
    return None


def _load_newest(rank: Rank, steps: list[int], reporter: Reporter | None) -> dict[str, Any]:
    world, store = rank.groups.control, rank.store
    damaged: dict[int, Damaged] = {}
    for step in reversed(steps):
        try:
            checkpoint = _agreed(world, partial(store.open, step))
            refuse_if_any(incompatibilities(checkpoint.manifest.facts, rank.config, rank.data))
            refuse_if_any(other_dtype(checkpoint.manifest.facts, rank.dtype))
            _agreed(world, partial(_fill, rank, checkpoint))
        except Damaged as found:
            damaged[step] = found
            continue
        rank.stepper.optimizer.steps = step
        rank.stepper.optimizer.publish()
        if reporter is not None:
            for newer, why in damaged.items():
                aside = store.set_aside(newer).name
                text = f"the checkpoint of step {newer} is damaged and now called {aside}: {why}"
                reporter.warn(step, f"{text}; the run goes on from step {step}")
        return dict(checkpoint.manifest.facts)
    raise refuse_damaged(list(damaged.values()))


def _start_from(rank: Rank, path: Path, reporter: Reporter | None) -> None:
    """Weights and routing biases alone. Raises `ConfigError`."""
    checkpoint = find_checkpoint(path)
    refuse_if_any(start_problems(checkpoint, rank.config, rank.data))

    def fill() -> None:
        for piece in rank.state():
            if piece.name.startswith(f"{MODEL}/"):
                checkpoint.fill(piece)

    try:
        _agreed(rank.groups.control, fill)
    except Damaged as damaged:
        hint = "is damaged; name another checkpoint"
        raise ConfigError([Problem("training.start_from", str(damaged), hint)]) from damaged
    rank.stepper.optimizer.publish()
    if rank.stepper.average is not None:
        rank.stepper.average.begin()
    if reporter is not None:
        reporter.start(checkpoint.path)


def _fill(rank: Rank, checkpoint: Checkpoint) -> None:
    for piece in rank.state():
        checkpoint.fill(piece)
    if checkpoint.missing([rng_name(rank.groups.rank)]):  # saved by fewer ranks
        torch.manual_seed(rank.config.training.seed + rank.groups.rank)
    else:
        torch.set_rng_state(checkpoint.read(rng_name(rank.groups.rank)))


def _state(rank: Rank) -> list[Piece]:
    number = rank.groups.rank
    return [*rank.state(), *whole_pieces(rng_name(number), torch.get_rng_state(), (number,))]


def _agreed(world: Group, function: Callable[[], T]) -> T:
    """`function()`. Raises `Damaged` on every rank if it does on any, `RunFailed` where a file cannot be read now."""
    failure: Damaged | OSError | None = None
    try:
        result = function()
    except (Damaged, OSError) as error:
        failure = error
    kinds = torch.tensor([isinstance(failure, kind) for kind in (Damaged, OSError)], dtype=torch.int64)
    damaged, unreadable = world.all_reduce_sum(kinds, "whether a checkpoint is whole").tolist()
    if damaged or unreadable:
        words = world.all_gather_objects(None if failure is None else str(failure), "why a checkpoint is not whole")
        reason = next(each for each in words if each)
        if unreadable:
            hint = "nothing was changed: when it can be read again, the same command goes on"
            raise RunFailed(f"a checkpoint cannot be read ({reason}); {hint}")
        raise Damaged(reason)
    return result


def _tell(saved: Saved | None, reporter: Reporter | None) -> None:
    if saved is not None and reporter is not None:
        reporter.checkpoint(saved)
