"""Generators that yield where another one may go on: running one to its end, and two in turns."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

Result = TypeVar("Result")
Other = TypeVar("Other")
Steps = Generator[None, bool | None, Result]
"""A yield returns whether another generator takes turns with this one: true while both have steps left."""


def drive(steps: Steps[Result]) -> Result:
    """Run a generator to its end, waiting for each communication where it is needed."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: Result = stop.value
            return result


def take_turns(first: Steps[Result], second: Steps[Other]) -> tuple[Result, Other]:
    """Run two generators to their ends, one step of each in turn: while one waits for its exchange the other computes.

    With a backward first and a forward second this is the report's order (§3.2.1, figure 4), since each launches an
    exchange at the end of its step and waits for it at the beginning of its next one. While both run each has three
    steps a layer: between the backward's mlp(B) and its next exchange the forward launches the second part of its
    dispatch, which mlp(B) hides. Behind that exchange, which waits for mlp(B), it would hide behind nothing.
    """
    results: list[Any] = [None, None]
    running = {0: first, 1: second}
    begun = False  # a generator takes nothing before its first yield
    while running:
        for turn, steps in list(running.items()):
            try:
                steps.send(len(running) == 2 if begun else None)
            except StopIteration as stop:
                results[turn] = stop.value
                del running[turn]
        begun = True
    return results[0], results[1]
