"""The activations in memory at the start and end of each instruction are of as many chunks as the program says."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from shoestring.comm.async_comm import build_async_communicator
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.trace import NullRecorder, TimelineTrack
from shoestring.parallelism.pipeline.instruction import Resumable
from shoestring.parallelism.pipeline.program import Op, count_in_flight
from shoestring.parallelism.pipeline.schedules.registry import SCHEDULES, build_placement
from shoestring.tests.parity.layouts import REPORT, Layout
from shoestring.tests.parity.runner import build, take_step
from shoestring.tests.processes import World, run_processes
from shoestring.tests.trainer.census import Census
from shoestring.trainer.run.stage_runner import StageRunner


@dataclass
class Watch(NullRecorder):
    """Records, per instruction, how many forwards have activations in memory before it and after it."""

    forwards: list[tuple[Census, int]] = field(default_factory=list)
    """Finished forwards, and the bytes that each kept."""
    seen: list[tuple[int, int]] = field(default_factory=list)

    @property
    def alive(self) -> int:
        """Number of forwards that keep over 10 % of their memory; the others keep losses, loads and a gradient."""
        return sum(census.bytes > kept // 10 for census, kept in self.forwards)

    @contextmanager
    def span(self, track: TimelineTrack, name: str, detail: object = None) -> Iterator[None]:
        before = self.alive
        yield
        if track is TimelineTrack.INSTRUCTION and name in list(Op):
            self.seen.append((before, self.alive))

    def forward(self, stage: StageRunner, micro_batch: int, received: Tensor | None) -> Resumable[Tensor | None]:
        """Run the stage's own forward under a census that excludes the time in which it is suspended."""
        census, steps = Census(), FORWARD(stage, micro_batch, received)
        while True:
            with census:
                try:
                    next(steps)
                except StopIteration as stop:
                    output: Tensor | None = stop.value
                    break
            yield
        if output is not None:
            census.leave_out(output)  # belongs to the next stage
        self.forwards.append((census, census.bytes))
        return output


FORWARD = StageRunner.forward


def watched(world: World, layout: Layout) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return, per instruction, the chunks in memory before and after: measured, and by the program."""
    stages = layout.stages
    groups = ProcessGroups.create(layout.topology, world.rank, timedelta(seconds=60), stages.replica_pp_groups())
    watch = Watch()
    with closing(build_async_communicator(groups.ep, torch.device("cpu"))) as worker:
        stepper, gradients = build(layout, stages, groups, worker, watch)
        take_step(stepper, gradients, layout, 0, world.rank)  # creates buffers of later steps
        watch.seen.clear()
        with patch.object(StageRunner, "forward", lambda *arguments: watch.forward(*arguments)):
            take_step(stepper, gradients, layout, 1, world.rank)
    program = stepper.executor.program
    alive, instructions = count_in_flight(program)[groups.pp_rank], program.instructions[groups.pp_rank]
    expected = [
        (during - (instruction.forward is not None), during - (instruction.op in (Op.B, Op.W, Op.FB)))
        for during, instruction in zip(alive, instructions, strict=True)
    ]
    return watch.seen, expected


def layouts() -> Iterator[Layout]:
    for number, schedule in enumerate(each.name for each in SCHEDULES):
        layers = max(3, build_placement(schedule, 2).num_stages)
        recompute = REPORT if number % 2 else frozenset()
        yield Layout(1, 1, 6, 1, pp=2, schedule=schedule, layers=layers, recompute=recompute)


@pytest.mark.parametrize("layout", [*layouts()], ids=lambda layout: layout.schedule)
def test_chunks_in_memory_are_those_of_the_program(layout: Layout) -> None:
    for seen, expected in run_processes(2, watched, layout):
        assert seen == expected
        assert max(before for before, _ in seen) >= 1
