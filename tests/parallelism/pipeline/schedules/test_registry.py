"""The programs that schedules build: the number of each instruction, and refused sizes."""

import time

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.parallelism.pipeline.check import verify_program
from shoestring.parallelism.pipeline.schedules.registry import SCHEDULES, build_program


@pytest.mark.parametrize("schedule", [each.name for each in SCHEDULES])
def test_every_legal_size_is_right(schedule: str) -> None:
    tried = 0
    for ranks in range(1, 9):
        for micro_batches in (*range(1, 10), 2 * ranks, 2 * ranks + 1, 23, 24):
            try:
                program = build_program(schedule, ranks, micro_batches)
            except ConfigError:
                continue
            verify_program(program)
            tried += 1
    assert tried >= 12


def test_interleaved_with_any_number_of_chunks() -> None:
    for chunks in (2, 3, 5):
        program = build_program("interleaved", 4, 12, chunks)
        verify_program(program)
        assert program.placement.num_stages == 4 * chunks


@pytest.mark.parametrize(
    ("asked", "refused"),
    [
        (("dualpipe", 3, 12), {"ranks": "nearest 2 or 4"}),
        (("dualpipe", 1, 2), {"ranks": "nearest 2"}),
        (("dualpipe", 8, 21), {"micro_batches": "nearest 20 or 22"}),
        (
            ("dualpipe", 8, 10),
            {"micro_batches": "dualpipe on 8 ranks needs an even number ≥ 16: nearest 16"},
        ),
        (("dualpipe", 5, 7), {"ranks": "nearest 4 or 6", "micro_batches": "nearest 10"}),
        (("dualpipev", 4, 7), {"micro_batches": "nearest 8"}),
        (("dualpipev", 1, 1), {"micro_batches": "nearest 2"}),
        (("interleaved", 4, 10), {"micro_batches": "nearest 8 or 12"}),
        (("interleaved", 4, 2), {"micro_batches": "nearest 4"}),
        (("interleaved", 2, 4, 1), {"chunks": "at least 2 chunks"}),
        (("zb_h1", 2, 4, 2), {"chunks": "always has 1 chunk"}),
        (("dualpipe", 2, 4, 3), {"chunks": "always has 2 chunks"}),
        (("gpipe", 0, 0), {"ranks": "at least 1"}),
        (("gpipe", 2, 0), {"micro_batches": "at least 1: nearest 1"}),
        (("dualpip", 2, 4), {"schedule": "there are: gpipe, 1f1b, interleaved, zb_h1, dualpipe, dualpipev"}),
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
    start = time.process_time()  # CPU time of this process: other work on the machine does not count
    verify_program(build_program("dualpipe", 16, 120))
    assert time.process_time() - start < 1.0
