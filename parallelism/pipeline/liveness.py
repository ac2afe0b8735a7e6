"""What a rank holds while it runs a program: micro-batches in flight, delayed weight gradients, messages, weights.

Counts alone: what they weigh is the caller's business. Before its first use a weight may still be on its way from the
rank that has updated it; after its last one its gradient is final.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .communication import P2PBatch
from .placement import StagePlace
from .program import Instruction, Op, Program


@dataclass(frozen=True, slots=True)
class LiveCounts:
    """Counts, by chunk where there is a tuple."""

    alive: tuple[int, ...]
    """Micro-batches whose forward has run and whose backward, of inputs at least, has not begun."""
    waiting: tuple[int, ...]
    """Those between their I and their W."""
    messages: int
    """Activations and gradients that are here before they are needed, or made here and on their way."""

    def covers(self, other: LiveCounts) -> bool:
        """Whether this is as much as `other` of everything."""
        return (
            self.messages >= other.messages
            and all(map(int.__ge__, self.alive, other.alive))
            and all(map(int.__ge__, self.waiting, other.waiting))
        )


@dataclass(frozen=True, slots=True)
class LiveInstruction:
    """One kind of instruction at work, beside what is held while it runs.

    The micro-batch of its backward has left `alive` or `waiting`, that of its forward has not joined them: both are the
    instruction's own.
    """

    op: Op
    forward: int | None
    """Chunk."""
    backward: int | None
    """Chunk."""
    held: LiveCounts

    @property
    def work(self) -> tuple[Op, int | None, int | None]:
        """What the instruction does, whichever micro-batch it does it for."""
        return self.op, self.forward, self.backward

    @property
    def in_memory(self) -> tuple[int, ...]:
        """Micro-batches of each chunk of which anything is here."""
        counts = [sum(both) for both in zip(self.held.alive, self.held.waiting, strict=True)]
        for chunk in (self.forward, self.backward):
            if chunk is not None:
                counts[chunk] += 1
        return tuple(counts)


def moments(program: Program, rank: int, commits: Sequence[P2PBatch]) -> frozenset[LiveInstruction]:
    """All instructions of `rank` that may be its worst moment; others hold less of everything while doing the same.

    `commits` are those of the rank, from `edges`.
    """
    found: dict[tuple[Op, int | None, int | None], set[LiveCounts]] = {}
    for instruction, held in zip(program.instructions[rank], _held(program, rank, commits), strict=True):
        forward, backward = instruction.forward, instruction.backward
        chunks = None if forward is None else forward.chunk, None if backward is None else backward.chunk
        found.setdefault((instruction.op, *chunks), set()).add(held)
    return frozenset(LiveInstruction(*work, held) for work, all_held in found.items() for held in _largest(all_held))


def between(program: Program, rank: int, commits: Sequence[P2PBatch]) -> frozenset[LiveCounts]:
    """The largest of what `rank` holds when an instruction is about to begin, its messages included."""
    before, messages = _before(program, rank), _messages(program, rank, commits)
    return frozenset(
        _largest(LiveCounts(*counts, waiting) for counts, (waiting, _) in zip(before, messages, strict=True))
    )


def _largest(all_held: Iterable[LiveCounts]) -> Iterator[LiveCounts]:
    """Those that no other covers."""
    largest: list[LiveCounts] = []
    for held in sorted(set(all_held), key=lambda held: (*held.alive, *held.waiting, held.messages), reverse=True):
        if not any(other.covers(held) for other in largest):
            largest.append(held)
    yield from largest


def _held(program: Program, rank: int, commits: Sequence[P2PBatch]) -> Iterator[LiveCounts]:
    counts = zip(program.instructions[rank], _before(program, rank), _messages(program, rank, commits), strict=True)
    for instruction, before, (_, messages) in counts:
        alive, waiting = map(list, before)
        if instruction.backward is not None:
            own = waiting if instruction.op is Op.W else alive
            own[instruction.backward.chunk] -= 1
        yield LiveCounts(tuple(alive), tuple(waiting), messages)


def _before(program: Program, rank: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Alive and waiting before each instruction."""
    alive, waiting = [0] * program.chunks, [0] * program.chunks
    for instruction in program.instructions[rank]:
        yield tuple(alive), tuple(waiting)
        if instruction.forward is not None:
            alive[instruction.forward.chunk] += 1
        if instruction.backward is not None:
            chunk = instruction.backward.chunk
            alive[chunk] -= instruction.op is not Op.W
            waiting[chunk] += (instruction.op is Op.I) - (instruction.op is Op.W)


def _messages(program: Program, rank: int, commits: Sequence[P2PBatch]) -> Iterator[tuple[int, int]]:
    """Before each instruction and while it runs: received ahead, just sent, or going to another chunk of this rank."""
    here = 0
    for commit, instruction in zip(commits, program.instructions[rank], strict=False):
        here += len(commit.receives)
        taken = len(commit.needs) + _between_chunks(program, rank, instruction, made=False)
        sent = len(commit.sends)
        yield here + sent, here + sent - taken
        here += _between_chunks(program, rank, instruction, made=True) - taken


def _between_chunks(program: Program, rank: int, instruction: Instruction, *, made: bool) -> int:
    """Works of the instruction that take what another chunk of this rank has made, or that make such a thing."""
    placement, forward, backward = program.placement, instruction.forward, instruction.backward
    earlier, later = (placement.after, placement.before) if made else (placement.before, placement.after)
    found = forward is not None and _is_on(rank, earlier(StagePlace(rank, forward.chunk)))
    if instruction.op is Op.W or backward is None:
        return int(found)
    return found + _is_on(rank, later(StagePlace(rank, backward.chunk)))


def _is_on(rank: int, place: StagePlace | None) -> bool:
    return place is not None and place.rank == rank


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
        if any(program.placement.stage(StagePlace(rank, work.chunk)) in wanted for work in instruction.works):
            yield index
