"""The programs that schedules make: how many of each instruction, and which sizes are refused."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.parallelism.pipeline.check import check
from shoestring.parallelism.pipeline.program import MicroBatchWork, Op, Program
from shoestring.parallelism.pipeline.schedules.registry import SCHEDULES, build_program

EVEN = range(2, 17, 2)


def counts(program: Program, rank: int) -> Counter[Op]:
    return Counter(instruction.op for instruction in program.instructions[rank])


def written(program: Program, rank: int) -> str:
    """The rank's program in short: small letters are chunk 1."""
    letters = []
    for instruction in program.instructions[rank]:
        for op, work in zip(instruction.op.value, instruction.works, strict=True):
            letters.append((op.lower() if work.chunk else op) + str(work.micro_batch))
        letters.append(" ")
    return "".join(letters).strip()


def test_one_way_schedules_in_full() -> None:
    assert written(build_program("gpipe", 2, 2), 0) == "F0 F1 B0 B1"
    assert [written(build_program("one_f_one_b", 3, 4), rank) for rank in range(3)] == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]
    assert [written(build_program("zb1p", 2, 3), rank) for rank in range(2)] == [
        "F0 F1 I0 W0 F2 I1 W1 I2 W2",
        "F0 I0 F1 I1 W0 F2 I2 W1 W2",
    ]
    assert written(build_program("interleaved", 2, 2), 1) == "F0 F1 f0 b0 f1 b1 B0 B1"


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
    assert [program.data_index(MicroBatchWork(chunk, 2)) for chunk in range(2)] == [2, 5]
    assert [build_program("dualpipev", 2, 6).data_index(MicroBatchWork(chunk, 2)) for chunk in range(2)] == [2, 2]


@pytest.mark.parametrize("schedule", [each.name for each in SCHEDULES])
def test_every_legal_size_is_right(schedule: str) -> None:
    tried = 0
    for ranks in range(1, 9):
        for micro_batches in (*range(1, 10), 2 * ranks, 2 * ranks + 1, 23, 24):
            try:
                program = build_program(schedule, ranks, micro_batches)
            except ConfigError:
                continue
            check(program)
            tried += 1
    assert tried >= 12


def test_interleaved_with_any_number_of_chunks() -> None:
    for chunks in (2, 3, 5):
        program = build_program("interleaved", 4, 12, chunks)
        check(program)
        assert program.placement.stages == 4 * chunks


@pytest.mark.parametrize(
    ("asked", "refused"),
    [
        (("dualpipe", 3, 12), {"ranks": "nearest 2 or 4"}),
        (("dualpipe", 1, 2), {"ranks": "nearest 2"}),
        (("dualpipe", 8, 21), {"micro_batches": "nearest 20 or 22"}),
        (
            ("dualpipe", 8, 10),
            {"micro_batches": "(twice the ranks, which fill from both ends): nearest 16"},
        ),
        (("dualpipe", 5, 7), {"ranks": "nearest 4 or 6", "micro_batches": "nearest 10"}),
        (("dualpipev", 4, 7), {"micro_batches": "nearest 8"}),
        (("dualpipev", 1, 1), {"micro_batches": "nearest 2"}),
        (("interleaved", 4, 10), {"micro_batches": "nearest 8 or 12"}),
        (("interleaved", 4, 2), {"micro_batches": "nearest 4"}),
        (("interleaved", 2, 4, 1), {"chunks": "at least 2 chunks"}),
        (("zb1p", 2, 4, 2), {"chunks": "always has 1 chunk"}),
        (("dualpipe", 2, 4, 3), {"chunks": "always has 2 chunks"}),
        (("gpipe", 0, 0), {"ranks": "at least 1"}),
        (("gpipe", 2, 0), {"micro_batches": "at least 1: nearest 1"}),
        (("dualpip", 2, 4), {"schedule": "there are gpipe, one_f_one_b, interleaved, zb1p, dualpipe, dualpipev"}),
    ],
)
def test_illegal_sizes_are_refused_with_the_nearest_legal_ones(
    asked: tuple[str, int, int], refused: dict[str, str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_program(*asked)
    problems = {problem.field: problem.hint for problem in caught.value.problems}
    assert problems.keys() == refused.keys()
    for field, words in refused.items():
        assert words in problems[field]


def test_sixteen_ranks_and_120_micro_batches_take_less_than_a_second() -> None:
    start = time.process_time()  # of this process alone: other work on the machine does not count
    check(build_program("dualpipe", 16, 120))
    assert time.process_time() - start < 1.0
