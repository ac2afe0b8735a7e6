"""What is checked on disk and hardware before a run's first process exists."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from ..comm.deepep import deepep_problems
from ..comm.refusal import Problem, noting, refuse_if_any
from ..trainer.budget.render import over_budget
from ..trainer.budget.summary import summarise
from ..trainer.budget.terms import ALLOCATION_FILE
from ..trainer.checkpoint.compatible import incompatibilities, start_problems
from ..trainer.checkpoint.find import find_checkpoint
from ..trainer.checkpoint.store import CheckpointStore, refuse_damaged
from ..trainer.config import RunConfig
from ..trainer.data.manifest import Manifest
from ..trainer.data.prepared import open_prepared
from ..trainer.data.verified import verify_before_run
from ..trainer.rank import largest_dispatch, open_samples
from .run_dir import read_status, run_dir_problems


def preflight(config: RunConfig, local_ranks: int, *, fresh: bool, first_machine: bool = True) -> None:
    """Refuse, all at once, what cannot run on this machine or in this directory.

    Data that is missing, damaged or too short, GPUs or a DeepEP not there, a wandb without account, a directory that
    no run has made, a checkpoint of another run. `first_machine` is the one that speaks for the run.
    """
    problems: list[Problem] = []
    data = None
    with noting(problems):
        prepared = open_prepared(config.data)
        data = prepared.manifest
        open_samples(config, prepared)
        verify_before_run(Path(config.data.prepared), prepared.manifest, first_machine=first_machine)
    problems += [*_device_problems(config, local_ranks), *_exchange_problems(config, local_ranks)]
    if first_machine and config.telemetry.wandb.mode == "online":
        from ..trainer.telemetry.wandb_sink import account_problems  # a second of import, for the runs that use it

        problems += account_problems()
    foreign = list(run_dir_problems(Path(config.training.run_dir)))
    with noting(problems):
        if not foreign:
            problems += _checkpoint_problems(config, data, fresh=fresh)
    refuse_if_any([*problems, *foreign])


def _checkpoint_problems(config: RunConfig, data: Manifest | None, *, fresh: bool) -> Iterator[Problem]:
    """Of the last one that looks whole: the run takes that, and says so. Or of that which a new run begins with."""
    checkpoint, damaged = (None, []) if fresh else _store(config).last_good()
    if checkpoint is not None:
        yield from incompatibilities(checkpoint.manifest.facts, config, data)
    elif damaged:
        raise refuse_damaged(damaged)
    elif config.training.start_from is not None:
        start, run_dir = Path(config.training.start_from), Path(config.training.run_dir)
        if fresh and start.resolve().is_relative_to(run_dir.resolve()):
            yield Problem("training.start_from", str(start), f"lies in {run_dir}, which --fresh empties; move it first")
        yield from start_problems(find_checkpoint(start), config, data)


def is_finished(config: RunConfig) -> bool:
    """Whether the run directory holds a run of this length that ended as it should, sample and summary included."""
    steps, status = _store(config).steps(), read_status(Path(config.training.run_dir))
    return bool(steps) and steps[-1] >= config.total_steps and status is not None and status["exit_code"] == 0


def spent_budget(config: RunConfig) -> str | None:
    """Why no step may be trained: what the run has used is its budget or more. Raises `Refused` for a broken ledger."""
    run_dir, steps = Path(config.training.run_dir), _store(config).steps()
    if not (run_dir / ALLOCATION_FILE).exists() or (steps and steps[-1] >= config.total_steps):
        return None
    spent = summarise(run_dir).gpu_hours
    return over_budget(spent, config.budget.gpu_hours) if spent >= config.budget.gpu_hours else None


def _store(config: RunConfig) -> CheckpointStore:
    return CheckpointStore(Path(config.training.run_dir) / "checkpoints", config.training.keep_checkpoints)


def _device_problems(config: RunConfig, local_ranks: int) -> Iterator[Problem]:
    gpus = torch.cuda.device_count()
    if config.training.device == "cuda" and gpus < local_ranks:
        remedy = f"{local_ranks} ranks need a GPU each and this machine has {gpus}; write auto or cpu, or fewer ranks"
        yield Problem("training.device", "cuda", remedy)


def _exchange_problems(config: RunConfig, local_ranks: int) -> Iterator[Problem]:
    if config.exchange.name == "deepep":
        dtype = config.precision.compute_dtype(torch.device("cuda"))
        shape = largest_dispatch(config)
        yield from deepep_problems(shape, config.topology.ep, dtype, config.training.device, local_ranks)
