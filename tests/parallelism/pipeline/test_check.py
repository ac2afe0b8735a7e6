"""`verify_program` refuses every broken program and says where it is broken."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from shoestring.parallelism.pipeline.check import verify_program
from shoestring.parallelism.pipeline.placement import PlacementStyle, StagePlacement
from shoestring.parallelism.pipeline.program import (
    ChunkMicroBatch,
    Instruction,
    InvalidProgramError,
    Op,
    PipelineProgram,
    count_in_flight,
)
from shoestring.parallelism.pipeline.schedules.registry import SCHEDULES, build_program

Row = list[Instruction]
NAMES = [each.name for each in SCHEDULES]


def changed(program: PipelineProgram, rank: int, change: Callable[[Row], Row]) -> PipelineProgram:
    """Return `program` with one rank's list changed."""
    rows = [list(row) for row in program.instructions]
    rows[rank] = change(rows[rank])
    return replace(program, instructions=tuple(map(tuple, rows)))


def position(row: Row, op: Op, micro_batch: int) -> int:
    return next(
        i for i, entry in enumerate(row) if entry.op is op and entry.chunk_micro_batches[0].micro_batch == micro_batch
    )


def moved(op: Op, micro_batch: int, before: tuple[Op, int]) -> Callable[[Row], Row]:
    """Return a change that moves one instruction in front of another."""

    def change(row: Row) -> Row:
        entry = row.pop(position(row, op, micro_batch))
        row.insert(position(row, *before), entry)
        return row

    return change


def dropped(index: int) -> Callable[[Row], Row]:
    return lambda row: row[:index] + row[index + 1 :]


def doubled(index: int) -> Callable[[Row], Row]:
    return lambda row: row[: index + 1] + row[index:]


def appended(entry: Instruction) -> Callable[[Row], Row]:
    return lambda row: [*row, entry]


def swap_first_two(row: Row) -> Row:
    return [row[1], row[0], *row[2:]]


@pytest.mark.parametrize("name", NAMES)
def test_every_dropped_instruction_is_missed(name: str) -> None:
    program = build_program(name, 4, 8)
    for rank, row in enumerate(program.instructions):
        for index in range(len(row)):
            broken = changed(program, rank, dropped(index))
            with pytest.raises(InvalidProgramError, match=rf"rank {rank}: .* 0 times instead of once"):
                verify_program(broken)


@pytest.mark.parametrize("name", NAMES)
def test_every_duplicate_is_found(name: str) -> None:
    program = build_program(name, 4, 8)
    for index in range(len(program.instructions[1])):
        broken = changed(program, 1, doubled(index))
        with pytest.raises(InvalidProgramError, match=r"rank 1: .* 2 times instead of once"):
            verify_program(broken)


def test_a_backward_needs_its_forward() -> None:
    broken = changed(build_program("1f1b", 2, 4), 1, moved(Op.B, 0, before=(Op.F, 0)))
    with pytest.raises(
        InvalidProgramError, match=r"rank 1, instruction 0 \(B chunk 0 micro-batch 0\): needs the forward"
    ):
        verify_program(broken)


def test_the_turn_of_a_v_hands_over_in_order() -> None:
    with pytest.raises(InvalidProgramError, match=r"rank 1, instruction 0 .*chunk 1 .*needs the forward of chunk 0"):
        verify_program(changed(build_program("dualpipev", 2, 4), 1, swap_first_two))


def test_the_halves_of_a_pair_must_not_need_each_other() -> None:
    pair = Instruction(Op.FB, forward=ChunkMicroBatch(0, 0), backward=ChunkMicroBatch(0, 0))
    with pytest.raises(InvalidProgramError, match="needs the forward of chunk 0 micro-batch 0 before it"):
        verify_program(PipelineProgram("by hand", StagePlacement(PlacementStyle.LOOP, 1, 1), 1, ((pair,),)))


def test_weight_gradients_come_after_their_own_and_in_order() -> None:
    program = build_program("zb_h1", 2, 4)
    with pytest.raises(InvalidProgramError, match=r"rank 1, .*\(W chunk 0 micro-batch 3\): before its I"):
        verify_program(changed(program, 1, moved(Op.W, 3, before=(Op.I, 3))))
    with pytest.raises(
        InvalidProgramError, match=r"rank 1, .*\(W chunk 0 micro-batch 3\): out of order.*micro_batch=2"
    ):
        verify_program(changed(program, 1, moved(Op.W, 3, before=(Op.W, 2))))


def test_a_deadlock_is_reported_with_every_waiting_rank() -> None:
    # Rank 1 receives a second activation before it sends the first gradient, for which rank 0 waits.
    program = build_program("1f1b", 2, 4)
    eager = changed(program, 1, moved(Op.F, 1, before=(Op.B, 0)))
    verify_program(eager)  # rank 0 has sent two by then
    with pytest.raises(
        InvalidProgramError, match=r"deadlock: rank 0, instruction 2 .* waits .*; rank 1, instruction 2 "
    ):
        verify_program(changed(eager, 1, moved(Op.F, 2, before=(Op.B, 0))))


def test_one_rank_may_make_things_in_another_order_but_not_two_that_wait_for_each_other() -> None:
    verify_program(changed(build_program("gpipe", 2, 3), 1, moved(Op.B, 2, before=(Op.B, 0))))

    one = changed(build_program("dualpipe", 2, 4), 0, swap_first_two)  # first the micro-batch of the other direction
    verify_program(one)
    with pytest.raises(InvalidProgramError, match=r"deadlock: rank 0, instruction 0 .*; rank 1, instruction 0 "):
        verify_program(changed(one, 1, swap_first_two))


def test_nonsense_is_named() -> None:
    program = build_program("gpipe", 2, 2)
    with pytest.raises(InvalidProgramError, match="1 lists of instructions for 2 ranks"):
        verify_program(replace(program, instructions=program.instructions[:1]))
    for work in (ChunkMicroBatch(1, 0), ChunkMicroBatch(0, 2), ChunkMicroBatch(0, -1)):
        with pytest.raises(InvalidProgramError, match=r"rank 0, instruction 4 .* no such chunk or micro-batch"):
            verify_program(changed(program, 0, appended(Instruction(Op.F, work))))
    with pytest.raises(InvalidProgramError, match="5 micro-batches cannot be halved"):
        verify_program(replace(build_program("dualpipe", 2, 4), num_micro_batches=5))


def test_peaks_of_chunks_in_flight() -> None:
    assert verify_program(build_program("gpipe", 3, 5)) == (5, 5, 5)
    assert verify_program(build_program("1f1b", 4, 8)) == (4, 3, 2, 1)
    assert verify_program(build_program("zb_h1", 4, 8)) == (4, 4, 4, 4)
    assert verify_program(build_program("interleaved", 4, 8)) == (11, 9, 7, 5)


def test_activations_live_until_the_weight_gradient() -> None:
    (alive,) = count_in_flight(build_program("zb_h1", 1, 2))
    assert alive == (1, 1, 1, 1, 1, 1)  # F I W F I W
    last = count_in_flight(build_program("zb_h1", 2, 3))[1]
    assert last == (1, 1, 2, 2, 2, 2, 2, 2, 1)  # F0 I0 F1 I1 W0 F2 I2 W1 W2
