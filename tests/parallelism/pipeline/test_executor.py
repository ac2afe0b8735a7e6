"""The executor on stages of one product each: serial gradients, I and W separate, errors that name the message."""

import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import pytest
import torch
from torch import Tensor

from shoestring.comm.errors import CollectiveError
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.p2p import P2PChannel, P2PReceive, P2PSend
from shoestring.comm.topology import Topology
from shoestring.parallelism.pipeline.executor import PipelineExecutor, build_p2p_channels
from shoestring.parallelism.pipeline.instruction import Resumable
from shoestring.parallelism.pipeline.placement import StageLocation
from shoestring.parallelism.pipeline.program import PipelineProgram
from shoestring.parallelism.pipeline.schedules.registry import (
    SCHEDULES,
    build_forward_program,
    build_placement,
    build_program,
)
from shoestring.parallelism.pipeline.simulate import OpDurations, simulate_program
from shoestring.parallelism.weight_grad import DelayedWeightGradients, linear
from shoestring.tests.processes import RanksFailed, World, run_processes

WIDTH, ROWS, MICRO_BATCHES = 4, 3, 8


def weight_of(stage: int) -> Tensor:
    return torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(stage))


def inputs_of(micro_batch: int) -> Tensor:
    return torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(100 + micro_batch))


@dataclass
class ProductStage:
    """y = tanh(x Wᵀ); the first stage has inputs, the last one's loss is Σ (1 + micro-batch) y."""

    weight: Tensor
    is_first: bool
    is_last: bool
    diary: list[str] = field(default_factory=list)
    alive: dict[int, tuple[Tensor, Tensor, DelayedWeightGradients]] = field(default_factory=dict)

    def forward(self, micro_batch: int, received: Tensor | None) -> Resumable[Tensor | None]:
        yield
        x = inputs_of(micro_batch) if self.is_first else received
        assert x is not None
        x = x.detach().requires_grad_()
        left = DelayedWeightGradients()
        with left.collect_from_forward():
            y = linear(x, self.weight).tanh()
        self.alive[micro_batch] = x, y, left
        self.diary.append(f"F{micro_batch}")
        return None if self.is_last else y.detach()

    def backward(
        self, micro_batch: int, received: Tensor | None, weights: DelayedWeightGradients
    ) -> Resumable[Tensor | None]:
        yield
        x, y, left = self.alive.pop(micro_batch)
        y.backward(torch.full_like(y, 1.0 + micro_batch) if self.is_last else received)
        self.diary.append(f"B{micro_batch}")
        left.add_task(lambda: self.diary.append(f"W{micro_batch}"))
        weights.move_tasks_from(left)
        weights.flush_unless_deferred()
        return None if self.is_first else x.grad

    def empty_activation(self, micro_batch: int) -> Tensor:
        return torch.empty(ROWS, WIDTH, dtype=torch.float64)


def stages_of(program: PipelineProgram, rank: int) -> list[ProductStage]:
    placement = program.placement
    places = [StageLocation(rank, chunk) for chunk in range(placement.chunks_per_rank)]
    return [
        ProductStage(
            weight_of(placement.stage_at(place)).requires_grad_(),
            placement.is_first_stage(place),
            placement.is_last_stage(place),
        )
        for place in places
    ]


def open_executor(
    world: World, program: PipelineProgram, limit: float = 30
) -> tuple[PipelineExecutor, list[P2PChannel]]:
    topology = Topology(pp=world.size)
    groups = ProcessGroups.create(topology, world.rank, timedelta(seconds=limit))
    channels = build_p2p_channels(groups.pp_next, groups.pp_prev, torch.device("cpu"))
    return PipelineExecutor(program, world.rank, channels, groups.pp_next.ranks), list(channels.values())


def run_twice(world: World, schedule: str, micro_batches: int) -> list[tuple[int, Tensor, list[str]]]:
    """Return, per chunk, its stage, the gradient of its weight after two runs, and the diary of both."""
    program = build_program(schedule, world.size, micro_batches)
    executor, channels = open_executor(world, program)
    stages = stages_of(program, world.rank)
    for _ in range(2):
        executor.run(stages)
        assert not any(stage.alive for stage in stages)
    for channel in channels:
        channel.close()
    result = []
    for chunk, stage in enumerate(stages):
        assert stage.weight.grad is not None
        result.append((program.placement.stage_at(StageLocation(world.rank, chunk)), stage.weight.grad, stage.diary))
    return result


def serial_gradients(stages: int, micro_batches: Sequence[int]) -> list[Tensor]:
    weights = [weight_of(stage).requires_grad_() for stage in range(stages)]
    for micro_batch in micro_batches:
        y = inputs_of(micro_batch)
        for weight in weights:
            y = torch.tanh(y @ weight.T)
        ((1.0 + micro_batch) * y).sum().backward()
    return [weight.grad for weight in weights if weight.grad is not None]


@pytest.mark.parametrize("schedule", [each.name for each in SCHEDULES])
@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_are_those_of_a_serial_run(schedule: str, ranks: int) -> None:
    program = build_program(schedule, ranks, MICRO_BATCHES)
    expected = serial_gradients(program.placement.num_stages, range(MICRO_BATCHES))
    summed = [torch.zeros_like(weight) for weight in expected]
    for per_chunk in run_processes(ranks, run_twice, schedule, MICRO_BATCHES):
        for stage, grad, _ in per_chunk:
            summed[stage] += grad
    for grad, serial in zip(summed, expected, strict=True):
        torch.testing.assert_close(grad, 2 * serial, rtol=1e-12, atol=1e-12)


def test_one_rank_runs_a_v_alone() -> None:
    ((first, second),) = run_processes(1, run_twice, "dualpipev", 3)
    expected = serial_gradients(2, range(3))
    torch.testing.assert_close(first[1], 2 * expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(second[1], 2 * expected[1], rtol=1e-12, atol=1e-12)


def test_weight_gradients_wait_for_their_own_instruction() -> None:
    program = build_program("zb_h1", 2, 4)
    for rank, ((_, _, diary),) in enumerate(run_processes(2, run_twice, "zb_h1", 4)):
        once = diary[: len(diary) // 2]
        written = [
            letter
            for instruction in program.instructions[rank]
            for letter in {"F": "F", "B": "BW", "I": "B", "W": "W"}[instruction.op]
        ]
        assert [entry[0] for entry in once] == written
        assert [entry for entry in once if entry[0] == "W"] == [f"W{index}" for index in range(4)]


def forward_alone(world: World, schedule: str) -> list[str]:
    placement = build_program(schedule, world.size, MICRO_BATCHES).placement
    program = build_forward_program(placement, 9)
    executor, _ = open_executor(world, program)
    stages = stages_of(program, world.rank)
    executor.run(stages)
    return [entry for stage in stages for entry in stage.diary]


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "dualpipe", "dualpipev"])
def test_forwards_alone(schedule: str) -> None:
    for diary in run_processes(2, forward_alone, schedule):
        assert sorted(set(diary)) == [f"F{number}" for number in range(9)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("schedule", [each.name for each in SCHEDULES])
def test_forwards_of_any_number_come_to_their_end(schedule: str, ranks: int) -> None:
    if schedule == "dualpipe" and ranks == 1:
        pytest.skip("DualPipe has two ranks at least")
    placement = build_placement(schedule, ranks)
    for rounds in range(1, 5 * ranks):
        program = build_forward_program(placement, rounds)
        times = simulate_program(program, OpDurations())
        places = program.placement.num_stages // ranks
        assert all(len(ends) == places * rounds for ends in times.end_times)


def messages_alive(world: World, micro_batches: int) -> int:
    """Return the largest number of received messages that the second rank had in memory."""
    executor, channels = open_executor(world, build_program("1f1b", world.size, micro_batches))
    stages = stages_of(build_program("1f1b", world.size, micro_batches), world.rank)
    seen: list[weakref.ref[Tensor]] = []
    most = 0

    class Counting(ProductStage):
        def forward(self, micro_batch: int, received: Tensor | None) -> Resumable[Tensor | None]:
            nonlocal most
            if received is not None:
                seen.append(weakref.ref(received))
            most = max(most, sum(ref() is not None for ref in seen))
            return (yield from super().forward(micro_batch, received))

    executor.run([Counting(stage.weight, stage.is_first, stage.is_last) for stage in stages])
    for channel in channels:
        channel.close()
    return most


def test_received_messages_are_freed_when_they_are_used() -> None:
    few, many = (run_processes(2, messages_alive, count)[1] for count in (4, 24))
    assert few == many <= 4


class Broken(ProductStage):
    """A stage that fails at its second micro-batch."""

    def forward(self, micro_batch: int, received: Tensor | None) -> Resumable[Tensor | None]:
        if micro_batch == 1:
            raise ValueError("the stage is broken")
        return (yield from super().forward(micro_batch, received))


def one_stage_raises(world: World) -> None:
    program = build_program("1f1b", world.size, 4)
    executor, _ = open_executor(world, program)
    stages: list[ProductStage] = stages_of(program, world.rank)
    if world.rank == 1:
        stages = [Broken(stage.weight, stage.is_first, stage.is_last) for stage in stages]
    executor.run(stages)


def test_a_stage_that_raises_is_shown_first() -> None:
    with pytest.raises(RanksFailed) as failure:
        run_processes(2, one_stage_raises)
    assert str(failure.value).startswith("rank 1 of 2 failed:")
    assert "ValueError: the stage is broken" in str(failure.value)


def silent_neighbor(world: World) -> str:
    program = build_program("1f1b", world.size, 4)
    executor, channels = open_executor(world, program, limit=1)
    if world.rank == 0:
        return ""  # never sends
    with pytest.raises(CollectiveError) as failure:
        executor.run(stages_of(program, world.rank))
    for channel in channels:
        channel.close()
    return str(failure.value)


def neighbor_that_leaves(world: World) -> list[str]:
    """Return rank 0's errors when it waits for rank 1, and when it then posts to it."""
    _, channels = open_executor(world, build_program("1f1b", world.size, 4))
    if world.rank == 1:
        torch.distributed.destroy_process_group()
        return []

    def ask(channel: P2PChannel) -> None:
        channel.post([], [P2PReceive("an answer", lambda: torch.zeros(1), 1)])[0].wait()

    def tell(channel: P2PChannel) -> None:
        channel.post([P2PSend("a message", torch.zeros(1), 1)], [])

    heard = []
    for post in (ask, tell, ask):
        with pytest.raises(CollectiveError) as failure:
            post(channels[0])
        heard.append(str(failure.value))
    return heard


def test_a_neighbor_that_is_gone_is_named_by_the_rank_that_posts_to_it() -> None:
    first, *later = run_processes(2, neighbor_that_leaves)[0]
    assert first.startswith("rank 0: an answer with ranks 1 failed")
    assert later[0].startswith("rank 0: a message with ranks 1 failed")
    assert later[1].startswith("rank 0: an answer with ranks 1 failed")


def test_a_message_that_does_not_come_is_named() -> None:
    _, message = run_processes(2, silent_neighbor)
    edge = r"activation of micro-batch 0 from rank 0 chunk 0 to rank 1 chunk 0"
    wanted = rf"rank 1, instruction 0 \(F chunk 0 micro-batch 0\): waiting for the {edge}: rank 1: {edge} with ranks 0 "
    assert re.match(wanted + r"failed after 1\.\d s \(limit 1 s\): ", message), message
