"""The JSON is the program and nothing else; drawings are to scale and complete."""

from __future__ import annotations

import re

import pytest

from shoestring.parallelism.pipeline.draw import draw_ascii_timeline, program_to_json
from shoestring.parallelism.pipeline.schedules.registry import SCHEDULES, build_program
from shoestring.parallelism.pipeline.simulate import OpDurations, simulate_program


def test_json_of_one_f_one_b_in_full() -> None:
    def one(op: str, micro_batch: int) -> dict[str, object]:
        return {"op": op, "chunk": 0, "micro_batch": micro_batch}

    assert program_to_json(build_program("1f1b", 2, 2)) == {
        "schedule": "1f1b",
        "pp": 2,
        "micro_batches": 2,
        "ranks": [
            [one("F", 0), one("F", 1), one("B", 0), one("B", 1)],
            [one("F", 0), one("B", 0), one("F", 1), one("B", 1)],
        ],
    }


def test_json_of_dualpipe_counts_ranks_and_numbers_micro_batches_a_direction() -> None:
    tree = program_to_json(build_program("dualpipe", 4, 8))
    ranks = tree["ranks"]
    assert (tree["pp"], tree["micro_batches"]) == (4, 8)
    assert isinstance(ranks, list)
    assert len(ranks) == 4
    assert ranks[0][0] == {"op": "F", "chunk": 0, "micro_batch": 0}
    assert ranks[3][0] == {"op": "F", "chunk": 1, "micro_batch": 0}
    assert ranks[0][7] == {
        "op": "FB",
        "forward": {"chunk": 0, "micro_batch": 3},
        "backward": {"chunk": 1, "micro_batch": 1},
    }
    works = [work for entry in ranks[1] for work in (entry, entry.get("forward", {}), entry.get("backward", {}))]
    assert {work["micro_batch"] for work in works if "micro_batch" in work} == set(range(4))


def test_ascii_is_to_scale() -> None:
    assert draw_ascii_timeline(simulate_program(build_program("1f1b", 2, 2), OpDurations())).splitlines() == [
        "1f1b: 2 ranks, 2 micro-batches",
        "rank 0 |F0 F1 ......B0--- ...B1--- | bubble 3, in flight 2",
        "rank 1 |...F0 B0--- F1 B1--- ......| bubble 3, in flight 1",
        "makespan 9, bubble 33.3 % of the ranks' time",
    ]


def test_ascii_distinguishes_chunks() -> None:
    two = draw_ascii_timeline(simulate_program(build_program("dualpipe", 2, 4), OpDurations()))
    assert "|F0 f0 F1 b0--- f1B0---- " in two
    three = draw_ascii_timeline(simulate_program(build_program("interleaved", 1, 1, 3), OpDurations()))
    assert "|F0a F0b F0c B0c---- B0b---- B0a---- |" in three


@pytest.mark.parametrize(
    "times", [OpDurations(), OpDurations(1, 1.6, 0.8, forward_backward=2.6), OpDurations(0.3, 0.4, 0.1)], ids=str
)
@pytest.mark.parametrize("schedule", [each.name for each in SCHEDULES])
def test_ascii_rows_are_equally_long_and_name_every_instruction(schedule: str, times: OpDurations) -> None:
    program = build_program(schedule, 4, 12)
    rows = [
        line[line.index("|") : line.rindex("|")]
        for line in draw_ascii_timeline(simulate_program(program, times)).splitlines()[1:-1]
    ]
    assert len({len(row) for row in rows}) == 1
    for row, instructions in zip(rows, program.instructions, strict=True):
        assert len(re.findall(r"[FBIWfbiw][0-9Bb]+[-\w]*", row)) == len(instructions)
