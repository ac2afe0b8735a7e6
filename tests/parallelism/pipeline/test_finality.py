"""When gradients are final: after the last backward of a stage, in an order that all ranks agree on."""

from __future__ import annotations

import pytest

from shoestring.parallelism.pipeline.finality import BEFORE_THE_FIRST, finality, last_touch
from shoestring.parallelism.pipeline.placement import Place
from shoestring.parallelism.pipeline.program import Op
from shoestring.parallelism.pipeline.schedules import SCHEDULES, build_forward, build_placement, build_program


@pytest.mark.parametrize("name", [schedule.name for schedule in SCHEDULES])
def test_no_backward_of_a_stage_comes_after_its_end(name: str) -> None:
    program = build_program(name, 4, 8)
    for rank, instructions in enumerate(program.instructions):
        for chunk in range(program.chunks):
            stage = program.placement.stage(Place(rank, chunk))
            last = last_touch(program, rank, [stage])
            touching = [
                index
                for index, each in enumerate(instructions)
                if each.backward is not None and each.backward.chunk == chunk
            ]
            assert last == touching[-1]
            assert instructions[last].op in (Op.B, Op.W, Op.FB)
            assert last <= finality(program, [stage])
    every = range(program.placement.stages)
    assert last_touch(program, 0, every) == max(last_touch(program, 0, [stage]) for stage in every)


@pytest.mark.parametrize("name", ["interleaved", "dualpipe", "dualpipev"])
def test_with_two_chunks_one_is_final_while_the_other_still_runs(name: str) -> None:
    """What there is to overlap the reduction with."""
    program = build_program(name, 4, 8)
    for rank in range(4):
        ends = [last_touch(program, rank, [program.placement.stage(Place(rank, chunk))]) for chunk in range(2)]
        assert min(ends) < len(program.instructions[rank]) - 1


def test_forwards_touch_no_gradient() -> None:
    assert last_touch(build_forward(build_placement("gpipe", 2), 4), 0, [0, 1]) == BEFORE_THE_FIRST
