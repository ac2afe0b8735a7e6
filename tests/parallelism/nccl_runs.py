"""Runs a layout under NCCL's rules, with the classes that GPUs use and any part of the warm-up.

`python -m shoestring.tests.parallelism.nccl_runs` prints how every schedule ends without it.
"""

import re
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from enum import StrEnum
from itertools import product
from unittest.mock import patch

import torch

from shoestring.comm.async_comm import AsyncCommunicator, build_async_communicator
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.trace import NULL_RECORDER
from shoestring.comm.warm_up import warm_up_exchange
from shoestring.launch.compose import compose_run_config
from shoestring.parallelism.pipeline.executor import InstructionListener, PipelineExecutor, PipelineStage, _Run
from shoestring.parallelism.pipeline.schedules.registry import SCHEDULES, build_placement
from shoestring.tests.comm.nccl_rules import (
    FIRST_CONTACT,
    TRUNCATED,
    QueuedStreams,
    RulesGroups,
    computing_behind,
)
from shoestring.tests.parity.layouts import SEQUENCE_LENGTH, Layout, Padding
from shoestring.tests.parity.outcome import Errors, Outcome, compare
from shoestring.tests.parity.runner import build, outcome, take_step
from shoestring.tests.parity.single_process import run_single_process
from shoestring.tests.processes import RanksFailed, World, run_processes
from shoestring.trainer.build import build_engine, build_stage_layout
from shoestring.trainer.data.samples import TokenBatch
from shoestring.trainer.run.step import Stepper, StepSettings
from shoestring.trainer.run.warm_up import warm_up_step

STEPS = 2
CPU = torch.device("cpu")


class Start(StrEnum):
    """The connections made before the first step."""

    WARM = "everything"
    PAIRS = "pairs"  # neighbors and the token exchange, and no group that reduces gradients
    COLD = "nothing"


def connect(start: Start, stepper: Stepper, worker: AsyncCommunicator, layout: Layout, streams: QueuedStreams) -> None:
    if start is Start.WARM:
        batch = 1, SEQUENCE_LENGTH + 1 + layout.mtp
        warm_up_step(stepper, worker, layout.exchange, batch, CPU, streams)
    elif start is Start.PAIRS:
        stepper.executor.connect_neighbors(CPU)
        warm_up_exchange(layout.exchange, stepper.groups, worker, CPU)


def sends_after_the_listener(
    executor: PipelineExecutor, stages: Sequence[PipelineStage], listener: InstructionListener | None = None
) -> None:
    """Run `PipelineExecutor.run` with an instruction's sends after its listener."""
    run = _Run(executor, stages)
    for index, instruction in enumerate(executor.program.instructions[executor.pp_rank]):
        run.post(executor.p2p_batches[index])
        if listener is not None:
            listener.before_instruction(index)
        run.instruction(index, instruction)
        if listener is not None:
            listener.after_instruction(index)
    run.post(executor.p2p_batches[-1])
    run.finish()


def run_rank(world: World, layout: Layout, start: Start, late_sends: bool, patience: float) -> Outcome:
    """Train one rank under the rules. A first contact that takes longer than `patience` seconds is an error."""
    streams, limit = QueuedStreams(), timedelta(seconds=60)
    make = RulesGroups(world.rank, limit, streams, timedelta(seconds=patience))
    stages = layout.stages
    groups = ProcessGroups.create(layout.topology, world.rank, limit, stages.replica_pp_groups(), make)
    worker = build_async_communicator(groups.ep, CPU, streams=streams)
    stepper, gradients = build(layout, stages, groups, worker, streams=streams)
    order = patch.object(PipelineExecutor, "run", sends_after_the_listener) if late_sends else nullcontext()
    with order, computing_behind(streams):
        connect(start, stepper, worker, layout, streams)
        records = tuple(take_step(stepper, gradients, layout, step, world.rank) for step in range(STEPS))
        stepper.optimizer.wait_for_weights()
        return outcome(records, gradients)


def layout_of(schedule: str, pp: int, mtp: int) -> Layout:
    stages = build_placement(schedule, pp).num_stages
    return Layout(2, 1, 2 * pp, mtp, Padding.RAGGED, pp=pp, schedule=schedule, layers=max(3, stages))


MATRIX = [layout_of(each.name, pp, mtp) for pp, each, mtp in product((2, 4), SCHEDULES, (0, 1))]


def errors_of(layout: Layout) -> Errors:
    """Return the differences between a run with the whole warm-up and the reference."""
    ranks = run_processes(layout.topology.world_size, run_rank, layout, Start.WARM, False, 60.0)
    return compare(ranks, run_single_process(layout, STEPS))


def failure_of(layout: Layout, start: Start, *, late_sends: bool = False, patience: float = 3) -> str:
    """Return the first error that says where a run stopped, or "". A first contact may take `patience` seconds."""
    try:
        run_processes(layout.topology.world_size, run_rank, layout, start, late_sends, patience)
    except RanksFailed as failed:
        said = re.search(r"CollectiveError: (rank .*)", str(failed))
        return said.group(1) if said else str(failed)
    return ""


def open_and_step(world: World, overrides: Sequence[str]) -> float:
    """Return the loss of one step of a configured run, whose engine connects its own communicators."""
    config, streams, limit = compose_run_config(overrides), QueuedStreams(), timedelta(seconds=60)
    make = RulesGroups(world.rank, limit, streams, timedelta(seconds=10))
    groups = ProcessGroups.create(
        config.topology, world.rank, limit, build_stage_layout(config).replica_pp_groups(), make
    )
    with computing_behind(streams):
        engine = build_engine(config, groups, CPU, NULL_RECORDER, streams)
        shape = (config.schedule.micro_batch_size, config.tokens_per_sample)
        tokens_BW = torch.randint(config.model.vocab_size, shape)
        batches = [TokenBatch(tokens_BW, torch.ones_like(tokens_BW, dtype=torch.bool))] * config.num_micro_batches
        settings = StepSettings(
            learning_rate=1e-3, clip_norm=1, seq_aux_loss_coeff=0, mtp_loss_scaling_factor=0, router_bias_update_rate=0
        )
        loss = engine.stepper.step(batches, config.training.global_batch_size, settings).loss
        engine.close()
    return loss


def main() -> None:
    """Print how each row of the matrix ends without a warm-up, and with an instruction's sends after its listener."""
    for layout in MATRIX:
        row = f"{layout.schedule:12} pp {layout.pp} MTP {layout.mtp}"
        cold = failure_of(layout, Start.COLD, late_sends=True)
        hung = FIRST_CONTACT in cold or TRUNCATED in cold
        print(f"{row}  {'stops' if hung else 'fails' if cold else 'ends'}: {cold}", flush=True)


if __name__ == "__main__":
    main()
