"""What a rank holds while it runs a program: micro-batches in flight, delayed weight gradients, messages, weights.

Counts alone: what they weigh is the caller's business. Before its first use a weight may still be on its way from the
rank that has updated it; after its last one its gradient is final.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .communication import P2PBatch
from .placement import StageLocation
from .program import Instruction, Op, PipelineProgram


@dataclass(frozen=True, slots=True)
class LiveCounts:
    """Counts, by chunk where there is a tuple."""

    awaiting_backward: tuple[int, ...]
    """Micro-batches whose forward has run and whose backward, of inputs at least, has not begun."""
    awaiting_weight_grad: tuple[int, ...]
    """Those between their I and their W."""
    p2p_messages: int
    """Activations and gradients that are here before they are needed, or made here and on their way."""

    def dominates(self, other: LiveCounts) -> bool:
        """Whether this is as much as `other` of everything."""
        return (
            self.p2p_messages >= other.p2p_messages
            and all(map(int.__ge__, self.awaiting_backward, other.awaiting_backward))
            and all(map(int.__ge__, self.awaiting_weight_grad, other.awaiting_weight_grad))
        )


@dataclass(frozen=True, slots=True)
class LiveInstruction:
    """One kind of instruction at work, beside what is held while it runs.

    The micro-batch of its backward has left `alive` or `waiting`, that of its forward has not joined them: both are the
    instruction's own.
    """

    op: Op
    forward_chunk: int | None
    """Chunk."""
    backward_chunk: int | None
    """Chunk."""
    live_counts: LiveCounts

    @property
    def op_and_chunks(self) -> tuple[Op, int | None, int | None]:
        """What the instruction does, whichever micro-batch it does it for."""
        return self.op, self.forward_chunk, self.backward_chunk

    @property
    def micro_batches_in_memory(self) -> tuple[int, ...]:
        """Micro-batches of each chunk of which anything is here."""
        counts = [
            sum(both)
            for both in zip(self.live_counts.awaiting_backward, self.live_counts.awaiting_weight_grad, strict=True)
        ]
        for chunk in (self.forward_chunk, self.backward_chunk):
            if chunk is not None:
                counts[chunk] += 1
        return tuple(counts)


def peak_instructions(
    program: PipelineProgram, rank: int, p2p_batches: Sequence[P2PBatch]
) -> frozenset[LiveInstruction]:
    """All instructions of `rank` that may be its worst moment; others hold less of everything while doing the same.

    `commits` are those of the rank, from `edges`.
    """
    found: dict[tuple[Op, int | None, int | None], set[LiveCounts]] = {}
    for instruction, held in zip(program.instructions[rank], _held(program, rank, p2p_batches), strict=True):
        forward, backward = instruction.forward, instruction.backward
        chunks = None if forward is None else forward.chunk, None if backward is None else backward.chunk
        found.setdefault((instruction.op, *chunks), set()).add(held)
    return frozenset(LiveInstruction(*work, held) for work, all_held in found.items() for held in _largest(all_held))


def peak_counts_between_instructions(
    program: PipelineProgram, rank: int, p2p_batches: Sequence[P2PBatch]
) -> frozenset[LiveCounts]:
    """The largest of what `rank` holds when an instruction is about to begin, its messages included."""
    before, messages = _before(program, rank), _messages(program, rank, p2p_batches)
    return frozenset(
        _largest(LiveCounts(*counts, waiting) for counts, (waiting, _) in zip(before, messages, strict=True))
    )


def _largest(all_held: Iterable[LiveCounts]) -> Iterator[LiveCounts]:
    """Those that no other covers."""
    largest: list[LiveCounts] = []
    for held in sorted(
        set(all_held),
        key=lambda held: (*held.awaiting_backward, *held.awaiting_weight_grad, held.p2p_messages),
        reverse=True,
    ):
        if not any(other.dominates(held) for other in largest):
            largest.append(held)
    yield from largest


def _held(program: PipelineProgram, rank: int, commits: Sequence[P2PBatch]) -> Iterator[LiveCounts]:
    counts = zip(program.instructions[rank], _before(program, rank), _messages(program, rank, commits), strict=True)
    for instruction, before, (_, messages) in counts:
        alive, waiting = map(list, before)
        if instruction.backward is not None:
            own = waiting if instruction.op is Op.W else alive
            own[instruction.backward.chunk] -= 1
        yield LiveCounts(tuple(alive), tuple(waiting), messages)


def _before(program: PipelineProgram, rank: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Alive and waiting before each instruction."""
    alive, waiting = [0] * program.chunks_per_rank, [0] * program.chunks_per_rank
    for instruction in program.instructions[rank]:
        yield tuple(alive), tuple(waiting)
        if instruction.forward is not None:
            alive[instruction.forward.chunk] += 1
        if instruction.backward is not None:
            chunk = instruction.backward.chunk
            alive[chunk] -= instruction.op is not Op.W
            waiting[chunk] += (instruction.op is Op.I) - (instruction.op is Op.W)


def _messages(program: PipelineProgram, rank: int, commits: Sequence[P2PBatch]) -> Iterator[tuple[int, int]]:
    """Before each instruction and while it runs: received ahead, just sent, or going to another chunk of this rank."""
    here = 0
    for commit, instruction in zip(commits, program.instructions[rank], strict=False):
        here += len(commit.receives)
        taken = len(commit.required_receives) + _between_chunks(program, rank, instruction, made=False)
        sent = len(commit.sends)
        yield here + sent, here + sent - taken
        here += _between_chunks(program, rank, instruction, made=True) - taken


def _between_chunks(program: PipelineProgram, rank: int, instruction: Instruction, *, made: bool) -> int:
    """Works of the instruction that take what another chunk of this rank has made, or that make such a thing."""
    placement, forward, backward = program.placement, instruction.forward, instruction.backward
    earlier, later = (
        (placement.next_location, placement.previous_location)
        if made
        else (placement.previous_location, placement.next_location)
    )
    found = forward is not None and _is_on(rank, earlier(StageLocation(rank, forward.chunk)))
    if instruction.op is Op.W or backward is None:
        return int(found)
    return found + _is_on(rank, later(StageLocation(rank, backward.chunk)))


def _is_on(rank: int, place: StageLocation | None) -> bool:
    return place is not None and place.rank == rank


def first_use(program: PipelineProgram, rank: int, stages: Iterable[int]) -> int:
    """Index of the first instruction of `rank` that computes with weights of `stages`: a forward."""
    return next(_uses(program, rank, stages))


def last_use(program: PipelineProgram, rank: int, stages: Iterable[int]) -> int:
    """Index of the last instruction of `rank` that adds to gradients of weights of `stages`.

    Every backward of a chunk does: I for what autograd reaches at once (norms, routers), W for products put off.
    """
    *_, last = _uses(program, rank, stages)
    return last


def first_use_on_any_rank(program: PipelineProgram, stages: Iterable[int]) -> int:
    """The smallest `first_use` over the holders of `stages`: equal on all, so it can order what they do together."""
    return min(first_use(program, rank, stages) for rank in _holders(program, stages))


def last_use_on_any_rank(program: PipelineProgram, stages: Iterable[int]) -> int:
    """The largest `last_use` over the holders of `stages`."""
    return max(last_use(program, rank, stages) for rank in _holders(program, stages))


def _holders(program: PipelineProgram, stages: Iterable[int]) -> set[int]:
    return {place.rank for stage in stages for place in program.placement.locations_of_stage(stage)}


def _uses(program: PipelineProgram, rank: int, stages: Iterable[int]) -> Iterator[int]:
    wanted = set(stages)
    for index, instruction in enumerate(program.instructions[rank]):
        if any(
            program.placement.stage_at(StageLocation(rank, work.chunk)) in wanted
            for work in instruction.chunk_micro_batches
        ):
            yield index
