"""When the gradients of a stage's weights are final: read off the program, not guessed by hooks."""

from __future__ import annotations

from collections.abc import Iterable

from .placement import Place
from .program import Instruction, Program

BEFORE_THE_FIRST = -1
"""In place of an index: no instruction touches it."""


def last_touch(program: Program, rank: int, stages: Iterable[int]) -> int:
    """Index of the last instruction of `rank` that adds to gradients of weights of `stages`.

    Every backward of a chunk does: I for what autograd reaches at once (norms, routers), W for products put off.
    """
    wanted = set(stages)
    touching = (
        index
        for index, instruction in enumerate(program.instructions[rank])
        if _backward_stage(program, rank, instruction) in wanted
    )
    return max(touching, default=BEFORE_THE_FIRST)


def finality(program: Program, stages: Iterable[int]) -> int:
    """The largest `last_touch` over all ranks: equal on all of them, so it can order what they reduce together."""
    wanted = tuple(stages)
    return max(last_touch(program, rank, wanted) for rank in range(program.ranks))


def _backward_stage(program: Program, rank: int, instruction: Instruction) -> int | None:
    if instruction.backward is None:
        return None
    return program.placement.stage(Place(rank, instruction.backward.chunk))
