"""Generators that yield each time they have launched a communication: running one to its end, and two in turns."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

Result = TypeVar("Result")
Steps = Generator[None, None, Result]


def drive(steps: Steps[Result]) -> Result:
    """Run a generator to its end, waiting for each communication where it is needed."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: Result = stop.value
            return result
