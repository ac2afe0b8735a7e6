"""First and last use of a stage's weights: an order that all ranks agree on, and the compute left to overlap."""

import pytest

from shoestring.parallelism.pipeline.liveness import first_use, first_use_on_any_rank, last_use, last_use_on_any_rank
from shoestring.parallelism.pipeline.placement import StageLocation
from shoestring.parallelism.pipeline.program import Op
from shoestring.parallelism.pipeline.schedules.registry import SCHEDULES, build_program


@pytest.mark.parametrize("name", [schedule.name for schedule in SCHEDULES])
def test_a_stage_is_used_from_its_first_forward_to_its_last_backward(name: str) -> None:
    program = build_program(name, 4, 8)
    for rank, instructions in enumerate(program.instructions):
        for chunk in range(program.chunks_per_rank):
            stages = [program.placement.stage_at(StageLocation(rank, chunk))]
            first, last = first_use(program, rank, stages), last_use(program, rank, stages)
            forwards = [i for i, each in enumerate(instructions) if each.forward and each.forward.chunk == chunk]
            backwards = [i for i, each in enumerate(instructions) if each.backward and each.backward.chunk == chunk]
            assert (first, last) == (forwards[0], backwards[-1])
            assert instructions[last].op in (Op.B, Op.W, Op.FB)
            assert first_use_on_any_rank(program, stages) <= first
            assert last <= last_use_on_any_rank(program, stages)
    every = range(program.placement.num_stages)
    assert first_use(program, 0, every) == 0
    assert last_use(program, 0, every) == len(program.instructions[0]) - 1


@pytest.mark.parametrize("name", ["interleaved", "dualpipe", "dualpipev"])
def test_of_two_chunks_one_is_done_while_the_other_still_runs(name: str) -> None:
    """That chunk's compute can hide a reduction, and likewise the all-gather of weights."""
    program = build_program(name, 4, 8)
    for rank, instructions in enumerate(program.instructions):
        stages = [[program.placement.stage_at(StageLocation(rank, chunk))] for chunk in range(2)]
        assert min(last_use(program, rank, each) for each in stages) < len(instructions) - 1
        assert max(first_use(program, rank, each) for each in stages) > 0
