"""A value that changes at token counts is the one that was set last, at the count itself already."""

import pytest

from shoestring.trainer.config import scheduled_value, value_schedule_problems

MTP_WEIGHT = {0: 0.3, 10**13: 0.1}  # report §4.2
UNORDERED = {500: 3.0, 0: 1.0, 100: 2.0}


@pytest.mark.parametrize(
    ("schedule", "tokens", "value"),
    [
        (MTP_WEIGHT, 0, 0.3),
        (MTP_WEIGHT, 10**13 - 1, 0.3),
        (MTP_WEIGHT, 10**13, 0.1),
        (MTP_WEIGHT, 148 * 10**11, 0.1),
        (UNORDERED, 99, 1.0),
        (UNORDERED, 100, 2.0),
        (UNORDERED, 499, 2.0),
        (UNORDERED, 10**6, 3.0),
    ],
)
def test_the_value_in_force(schedule: dict[int, float], tokens: int, value: float) -> None:
    assert scheduled_value(schedule, tokens) == value


@pytest.mark.parametrize(
    ("schedule", "hints"),
    [
        ({0: 0.0}, []),
        (MTP_WEIGHT, []),
        ({}, ["must give the value from the start"]),
        ({100: 0.1}, ["must give the value from the start"]),
        ({0: -0.1, 5: 0.1, -7: 0.1}, ["must be at least 0"] * 2),
        ({-1: -1.0}, ["must give the value from the start", "must be at least 0"]),
    ],
    ids=str,
)
def test_what_no_schedule_can_be(schedule: dict[int, float], hints: list[str]) -> None:
    problems = list(value_schedule_problems("weight", schedule))
    assert len(problems) == len(hints)
    for problem, hint in zip(problems, hints, strict=True):
        assert problem.field == "weight"
        assert hint in problem.hint
