"""What is checked on disk and hardware before a run's first process exists."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from ..comm.deepep import deepep_problems
from ..comm.refusal import Problem, refuse_if_any
from ..trainer.checkpoint.compatible import incompatibilities
from ..trainer.checkpoint.store import CheckpointStore
from ..trainer.config import RunConfig
from ..trainer.data.prepared import open_prepared
from ..trainer.rank import largest_dispatch, open_samples
from .run_dir import read_status


def preflight(config: RunConfig, local_ranks: int, *, fresh: bool) -> None:
    """Refuse data that is missing, damaged or too short, GPUs or a DeepEP not there, a checkpoint of another run."""
    prepared = open_prepared(config.data)
    open_samples(config, prepared)
    problems = [*_device_problems(config, local_ranks), *_exchange_problems(config, local_ranks)]
    store = _store(config)
    steps = store.steps()
    if steps and not fresh:
        problems += incompatibilities(store.facts(steps[-1]), config, prepared.manifest.digest)
    refuse_if_any(problems)


def is_finished(config: RunConfig) -> bool:
    """Whether the run directory holds a run of this length that ended as it should, sample and summary included."""
    steps, status = _store(config).steps(), read_status(Path(config.training.run_dir))
    return bool(steps) and steps[-1] >= config.total_steps and status is not None and status["exit_code"] == 0


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
