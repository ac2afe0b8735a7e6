"""The fast simulator gives the times of `simulate_program`, to the last bit."""

from __future__ import annotations

import random

import pytest

from shoestring.parallelism.pipeline.program import (
    ChunkMicroBatch,
    Instruction,
    InvalidProgramError,
    Op,
    PipelineProgram,
)
from shoestring.parallelism.pipeline.program_simulator import ProgramSimulator
from shoestring.parallelism.pipeline.schedules.registry import SCHEDULES, build_forward_program, build_program
from shoestring.parallelism.pipeline.simulate import simulate_program


@pytest.mark.parametrize("ranks", [1, 2, 4, 6])
@pytest.mark.parametrize("schedule", [schedule.name for schedule in SCHEDULES])
def test_times_equal_those_of_simulate_program(schedule: str, ranks: int) -> None:
    if schedule == "dualpipe" and ranks % 2:
        pytest.skip("mirrored ranks are even")
    program = build_program(schedule, ranks, 3 * ranks if schedule != "dualpipe" else 2 * ranks + 2)
    dice = random.Random(ranks)
    times = [[dice.uniform(0.5, 3.0) for _ in row] for row in program.instructions]
    numbers = {
        (rank, entry): times[rank][i] for rank, row in enumerate(program.instructions) for i, entry in enumerate(row)
    }

    def duration(rank: int, instruction: Instruction) -> float:
        return numbers[rank, instruction]

    timetable = ProgramSimulator.from_program(program)
    for transfer in (0.0, 0.25):
        slow, fast = simulate_program(program, duration, transfer), timetable.simulate(duration, transfer)
        assert slow.start_times == fast.start_times
        assert slow.end_times == fast.end_times


def test_forwards_alone() -> None:
    program = build_forward_program(build_program("interleaved", 3, 6).placement, 6)
    assert (
        ProgramSimulator.from_program(program).simulate(lambda rank, _: 1.0 + rank, 0.5).end_times
        == simulate_program(program, lambda rank, _: 1.0 + rank, 0.5).end_times
    )


def test_a_deadlock_is_found() -> None:
    program = build_program("1f1b", 2, 2)
    first, second = program.instructions
    backwards_first = (
        Instruction(Op.B, backward=ChunkMicroBatch(0, 0)),
        *(e for e in first if e.backward != ChunkMicroBatch(0, 0)),
    )
    with pytest.raises(InvalidProgramError, match="deadlock"):
        ProgramSimulator.from_program(PipelineProgram("broken", program.placement, 2, (backwards_first, second)))
