"""From when to when a rank uses the weights of a stage: read off the program, not guessed by hooks.

Before its first use a weight may still be on its way from the rank that has updated it; after its last one its gradient
is final.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .placement import Place
from .program import Program


def first_use(program: Program, rank: int, stages: Iterable[int]) -> int:
    """Index of the first instruction of `rank` that computes with weights of `stages`: a forward."""
    return next(_uses(program, rank, stages))


def last_use(program: Program, rank: int, stages: Iterable[int]) -> int:
    """Index of the last instruction of `rank` that adds to gradients of weights of `stages`.

    Every backward of a chunk does: I for what autograd reaches at once (norms, routers), W for products put off.
    """
    *_, last = _uses(program, rank, stages)
    return last


def first_use_anywhere(program: Program, stages: Iterable[int]) -> int:
    """The smallest `first_use` over the holders of `stages`: equal on all, so it can order what they do together."""
    return min(first_use(program, rank, stages) for rank in _holders(program, stages))


def last_use_anywhere(program: Program, stages: Iterable[int]) -> int:
    """The largest `last_use` over the holders of `stages`."""
    return max(last_use(program, rank, stages) for rank in _holders(program, stages))


def _holders(program: Program, stages: Iterable[int]) -> set[int]:
    return {place.rank for stage in stages for place in program.placement.holders(stage)}


def _uses(program: Program, rank: int, stages: Iterable[int]) -> Iterator[int]:
    wanted = set(stages)
    for index, instruction in enumerate(program.instructions[rank]):
        if any(program.placement.stage(Place(rank, work.chunk)) in wanted for work in instruction.works):
            yield index
