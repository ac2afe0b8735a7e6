"""Values that change at given token counts, such as the MTP weight: 0.3 for the first 10 T tokens, 0.1 after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..comm.errors import Problem


def value_at(schedule: Mapping[int, float], tokens: int) -> float:
    """The value in force after `tokens` consumed tokens: that of the largest key not above them."""
    return schedule[max(start for start in schedule if start <= tokens)]


def by_tokens_problems(field: str, schedule: Mapping[int, float]) -> Iterator[Problem]:
    """What is impossible about such a schedule: it must start at 0 and hold no negative value."""
    if 0 not in schedule:
        yield Problem(field, dict(schedule), "must say the value from the start: {0: …}")
    for start, value in schedule.items():
        if start < 0 or value < 0:
            yield Problem(field, {start: value}, "token counts and values must be at least 0")
