"""Rows for one BF16 training step of the tiny model, compared with FP32 in one CPU process: experts on all ranks, and
every pipeline schedule on two halves of the ranks.

Letters: B batch, W window of tokens.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
from torch import Tensor

from shoestring.benchmarks.rows.row import Check, Figures, Machine, NotHere, expect
from shoestring.comm.group_factory import build_group_factory
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.comm.trace import NULL_RECORDER
from shoestring.launch.compose import compose_run_config
from shoestring.parallelism.pipeline.schedules.registry import SCHEDULES
from shoestring.trainer.build import TrainingEngine, build_engine, build_stage_layout
from shoestring.trainer.config import RunConfig
from shoestring.trainer.data.samples import TokenBatch
from shoestring.trainer.run.step import StepSettings

SETTINGS = StepSettings(
    learning_rate=1e-3,
    clip_norm=1.0,
    seq_aux_loss_coeff=1e-4,
    mtp_loss_scaling_factor=0.3,
    router_bias_update_rate=0.001,
)
TIMEOUT = timedelta(minutes=2)
EXPERTS = 16
"""Routed experts of the tiny model."""
MICRO_BATCHES = 4
"""Micro-batches per data-parallel rank; DualPipe needs two per pipeline rank."""
LIMITS = 5e-3, 5e-2
"""Limits of the relative errors of loss and gradient norm in BF16."""


def training_step(machine: Machine) -> Figures:
    """Test loss and gradient norm of two steps, the second with updated weights, then time one step."""
    ranks = machine.world.size
    ep = math.gcd(ranks, EXPERTS)
    grid = [f"topology.ep={ep}", f"topology.edp={ranks // ep}", f"training.global_batch_size={2 * ranks}"]
    return _step(machine, [*grid, "schedule.micro_batch_size=2"])


def pipeline_step(schedule: str, machine: Machine) -> Figures:
    """Test a step on two pipeline ranks with multi-token prediction, whose head shares the embedding of the first rank.

    On four ranks or more, experts are distributed over the ranks of a pipeline rank, and the halves of an FB overlap.
    """
    ranks = machine.world.size
    if ranks % 2:
        raise NotHere("needs two GPUs" if ranks == 1 else "needs an even number of ranks")
    ep = math.gcd(ranks // 2, EXPERTS)
    grid = ["topology.pp=2", f"topology.ep={ep}", f"topology.edp={ranks // 2 // ep}"]
    batch = [f"training.global_batch_size={MICRO_BATCHES * ranks // 2}", "schedule.micro_batch_size=1"]
    return _step(machine, [*grid, *batch, f"schedule={schedule}"])


def overlapped_step(machine: Machine) -> Figures:
    """Test DualPipe on four ranks, two expert-parallel ranks per pipeline rank, with overlapped all-to-alls."""
    if machine.world.size % 4:
        raise NotHere("needs four GPUs, for two pipeline ranks of two expert-parallel ranks")
    return pipeline_step("dualpipe", machine)


def _step(machine: Machine, overrides: Sequence[str]) -> Figures:
    """Compare losses and gradient norms of two steps with the CPU's, and time a step."""
    config = compose_run_config(["model=tiny", "precision=bf16", *overrides])
    shape = (config.training.global_batch_size, config.tokens_per_sample)
    tokens_BW = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    alone = ProcessGroups.create(Topology(), 0, TIMEOUT)
    with _open(
        compose_run_config(["model=tiny", "precision=fp32"]), alone, torch.device("cpu"), tokens_BW
    ) as reference:
        truth = [reference.step() for _ in range(2)]

    make = build_group_factory(machine.device, machine.world.rank, TIMEOUT)
    holders = build_stage_layout(config).replica_pp_groups()
    groups = ProcessGroups.create(config.topology, machine.world.rank, TIMEOUT, holders, make)
    with _open(config, groups, machine.device, tokens_BW) as trainer:
        found = [trainer.step() for _ in range(2)]
        seconds = machine.seconds(trainer.step, repeats=3)
    errors = [
        expect(f"the {name} of step {step}", abs(ours - true) / true, limit)
        for step in range(2)
        for name, limit, ours, true in zip(("loss", "gradient norm"), LIMITS, found[step], truth[step], strict=True)
    ]
    return {
        "loss": found[1][0],
        "fp32_loss": truth[1][0],
        "loss_error": max(errors[::2]),
        "norm_error": max(errors[1::2]),
        "step_ms": seconds * 1e3,
    }


@dataclass(frozen=True)
class _Trainer:
    """Engine of one rank, and its micro-batches of a global batch."""

    engine: TrainingEngine
    micro_batches: list[TokenBatch]
    sequences: int

    def step(self) -> tuple[float, float]:
        """Run one step; return loss and gradient norm of the global batch."""
        result = self.engine.stepper.step(self.micro_batches, self.sequences, SETTINGS)
        return result.loss, result.grad_norm


@contextmanager
def _open(config: RunConfig, groups: ProcessGroups, device: torch.device, tokens_BW: Tensor) -> Iterator[_Trainer]:
    """Build this rank's engine with its part of the batch. On one rank the batch is one micro-batch."""
    own_BW = tokens_BW.chunk(groups.topology.dp)[groups.topology.dp_rank(groups.rank)]
    size = len(own_BW) if groups.world.size == 1 else config.schedule.micro_batch_size
    micro_batches = [
        TokenBatch(part_BW, torch.ones_like(part_BW, dtype=torch.bool)).to(device) for part_BW in own_BW.split(size)
    ]
    engine = build_engine(config, groups, device, NULL_RECORDER)
    try:
        yield _Trainer(engine, micro_batches, len(tokens_BW))
    finally:
        engine.close()


CHECKS = (
    Check("training step, tiny, bf16", training_step, mandatory=True),
    *(
        Check(f"pipeline of two, {schedule.name}", partial(pipeline_step, schedule.name), mandatory=True)
        for schedule in SCHEDULES
    ),
    Check("overlapped dispatch, 2 x 2", overlapped_step, mandatory=True),
)
