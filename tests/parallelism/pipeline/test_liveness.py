"""Tensors that a rank holds at each instruction, by hand and from the program."""

import pytest

from shoestring.parallelism.pipeline.communication import derive_p2p_batches
from shoestring.parallelism.pipeline.liveness import (
    LiveCounts,
    LiveInstruction,
    peak_counts_between_instructions,
    peak_instructions,
)
from shoestring.parallelism.pipeline.program import Op, count_in_flight
from shoestring.parallelism.pipeline.schedules.registry import SCHEDULES, build_placement, build_program


@pytest.mark.parametrize("schedule", [each.name for each in SCHEDULES])
def test_the_peak_is_that_of_the_program(schedule: str) -> None:
    program = build_program(schedule, 4, 12)
    for rank, (commits, alive) in enumerate(zip(derive_p2p_batches(program), count_in_flight(program), strict=True)):
        assert max(sum(moment.micro_batches_in_memory) for moment in peak_instructions(program, rank, commits)) == max(
            alive
        )


def test_zero_bubble_by_hand() -> None:
    """Two micro-batches on two ranks. The first: F F I I W W, its second F before the first gradient is back."""
    program = build_program("zb_h1", 2, 2)
    first = derive_p2p_batches(program)[0]
    ops = [instruction.op for instruction in program.instructions[0]]
    assert ops == [Op.F, Op.F, Op.I, Op.W, Op.I, Op.W]
    found = peak_instructions(program, 0, first)
    # While the second F runs, the first output is being sent, and the first gradient's buffer is allocated.
    assert LiveInstruction(Op.F, 0, None, LiveCounts((1,), (0,), 2)) in found
    assert {moment.live_counts.awaiting_backward for moment in found if moment.op is Op.I} == {(1,)}
    assert {moment.live_counts.awaiting_weight_grad for moment in found if moment.op is Op.W} == {
        (0,)
    }  # the running W has taken its own
    assert max(held.awaiting_backward[0] for held in peak_counts_between_instructions(program, 0, first)) == 2


def test_a_tensor_between_chunks_of_one_rank_is_a_message_too() -> None:
    """DualPipeV's last rank passes its first chunk's output to its second."""
    program = build_program("dualpipev", 2, 4)
    last = derive_p2p_batches(program)[1]
    messages = [held.p2p_messages for held in peak_counts_between_instructions(program, 1, last)]
    assert max(messages) >= 1
    assert build_placement("dualpipev", 2).num_stages == 4
