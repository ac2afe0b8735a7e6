"""DualPipe and DualPipeV, instruction by instruction, and their published numbers."""

from collections import Counter

import pytest

from shoestring.parallelism.pipeline.program import ChunkMicroBatch, Op, PipelineProgram
from shoestring.parallelism.pipeline.schedules.registry import build_program
from shoestring.tests.parallelism.pipeline.schedules.written import written

EVEN = range(2, 17, 2)


def counts(program: PipelineProgram, rank: int) -> Counter[Op]:
    return Counter(instruction.op for instruction in program.instructions[rank])


def test_dualpipe_and_its_fold_in_full() -> None:
    assert [written(build_program("dualpipe", 4, 8), rank) for rank in range(4)] == [
        "F0 F1 F2 f0 i0 w0 f1 F3b1 f2B0 b2 f3B1 b3 I2 W2 I3 W3",
        "F0 f0 F1 f1 F2 b0 f2B0 F3b1 f3B1 b2 B2 i3 I3 w3 W3",
        "f0 F0 f1 F1 f2 B0 F2b0 f3B1 F3b1 B2 b2 I3 i3 W3 w3",
        "f0 f1 f2 F0 I0 W0 F1 f3B1 F2b0 B2 F3b1 B3 i2 w2 i3 w3",
    ]
    assert [written(build_program("dualpipev", 2, 4), rank) for rank in range(2)] == [
        "F0 F1 F2 f0 i0 w0 f1 F3b1 f2B0 b2 f3B1 b3 I2 W2 I3 W3",
        "F0 f0 F1 f1 F2 b0 f2B0 F3b1 f3B1 b2 B2 i3 I3 w3 W3",
    ]


@pytest.mark.parametrize("ranks", EVEN)
def test_dualpipe_has_the_published_numbers_of_instructions(ranks: int) -> None:
    for micro_batches in (2 * ranks, 2 * ranks + 2, 3 * ranks, 120):
        program = build_program("dualpipe", ranks, micro_batches)
        for rank in range(ranks):
            from_end = min(rank, ranks - 1 - rank)
            middle = int(from_end == ranks // 2 - 1)
            alone = 3 * ranks // 2 - 1 - from_end + middle
            split = ranks - 1 - from_end
            assert counts(program, rank) == Counter(
                {Op.F: alone, Op.B: alone - split, Op.I: split, Op.W: split, Op.FB: micro_batches - alone}
            )


def test_dualpipe_of_deepseek_v3() -> None:
    program = build_program("dualpipe", 16, 120)
    assert [counts(program, rank)[Op.F] for rank in range(8)] == [23, 22, 21, 20, 19, 18, 17, 17]
    assert [counts(program, rank)[Op.FB] for rank in range(8)] == [97, 98, 99, 100, 101, 102, 103, 103]
    assert [counts(program, rank)[Op.W] for rank in range(8)] == [15, 14, 13, 12, 11, 10, 9, 8]


@pytest.mark.parametrize("ranks", range(1, 9))
def test_dualpipev_is_half_of_a_dualpipe_twice_as_long(ranks: int) -> None:
    for micro_batches in (2 * ranks, 2 * ranks + 1):
        half = build_program("dualpipev", ranks, micro_batches)
        whole = build_program("dualpipe", 2 * ranks, 2 * micro_batches)
        assert half.instructions == whole.instructions[:ranks]


def test_mirrored_ranks_of_dualpipe_do_the_same_with_chunks_exchanged() -> None:
    program = build_program("dualpipe", 6, 14)
    for rank in range(6):
        mirrored = written(program, 5 - rank).swapcase()
        assert written(program, rank) == mirrored


def test_micro_batches_of_the_two_directions_are_different_data() -> None:
    program = build_program("dualpipe", 2, 6)
    assert [program.global_micro_batch_index(ChunkMicroBatch(chunk, 2)) for chunk in range(2)] == [2, 5]
    assert [
        build_program("dualpipev", 2, 6).global_micro_batch_index(ChunkMicroBatch(chunk, 2)) for chunk in range(2)
    ] == [2, 2]
