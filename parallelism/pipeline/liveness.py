"""Liveness on one rank of a program: micro-batches in flight, delayed weight gradients, messages, uses of weights.

Counts only; callers multiply by bytes. Before its first use a weight may still be in an all-gather; after its last use
its gradient is final.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .communication import P2PBatch, iter_halves
from .placement import StageLocation
from .program import Op, PipelineProgram


@dataclass(frozen=True, slots=True)
class LiveCounts:
    """Numbers of live objects; tuples are by chunk."""

    awaiting_backward: tuple[int, ...]
    """Micro-batches whose forward has run and whose B, I or FB has not started."""
    awaiting_weight_grad: tuple[int, ...]
    """Micro-batches between their I and their W."""
    p2p_messages: int
    """Activations and gradients received before they are needed, or produced and not sent yet."""

    def dominates(self, other: "LiveCounts") -> bool:
        """Return whether every count is at least that of `other`."""
        return (
            self.p2p_messages >= other.p2p_messages
            and all(map(int.__ge__, self.awaiting_backward, other.awaiting_backward))
            and all(map(int.__ge__, self.awaiting_weight_grad, other.awaiting_weight_grad))
        )


@dataclass(frozen=True, slots=True)
class LiveInstruction:
    """One kind of instruction, and the live objects while it runs.

    The counts include neither the micro-batch of its forward nor that of its backward.
    """

    op: Op
    forward_chunk: int | None
    """Chunk of the forward."""
    backward_chunk: int | None
    """Chunk of the backward."""
    live_counts: LiveCounts

    @property
    def op_and_chunks(self) -> tuple[Op, int | None, int | None]:
        """Op and chunks, without the micro-batches."""
        return self.op, self.forward_chunk, self.backward_chunk

    @property
    def micro_batches_in_memory(self) -> tuple[int, ...]:
        """Micro-batches of each chunk that hold any memory."""
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
    """Return the instructions of `rank` at which its memory may peak; `p2p_batches` are those of the rank."""
    # Which one peaks depends on bytes, which are unknown here. An instruction of the same op and chunks with less of
    # everything cannot.
    found: dict[tuple[Op, int | None, int | None], set[LiveCounts]] = {}
    for instruction, held in zip(
        program.instructions[rank], _counts_while_running(program, rank, p2p_batches), strict=True
    ):
        found.setdefault(instruction.op_and_chunks, set()).add(held)
    return frozenset(
        LiveInstruction(*work, held) for work, all_counts in found.items() for held in _undominated(all_counts)
    )


def peak_counts_between_instructions(
    program: PipelineProgram, rank: int, p2p_batches: Sequence[P2PBatch]
) -> frozenset[LiveCounts]:
    """Return the undominated counts of `rank` just before its instructions, messages included."""
    before, messages = _counts_before(program, rank), _messages(program, rank, p2p_batches)
    return frozenset(
        _undominated(LiveCounts(*counts, waiting) for counts, (waiting, _) in zip(before, messages, strict=True))
    )


def _undominated(all_counts: Iterable[LiveCounts]) -> Iterator[LiveCounts]:
    """Yield the counts that no other dominates."""
    # In descending order: none is dominated by a later one, so each is compared with those already kept.
    largest: list[LiveCounts] = []
    for held in sorted(
        set(all_counts),
        key=lambda held: (*held.awaiting_backward, *held.awaiting_weight_grad, held.p2p_messages),
        reverse=True,
    ):
        if not any(other.dominates(held) for other in largest):
            largest.append(held)
    yield from largest


def _counts_while_running(program: PipelineProgram, rank: int, p2p_batches: Sequence[P2PBatch]) -> Iterator[LiveCounts]:
    counts = zip(
        program.instructions[rank], _counts_before(program, rank), _messages(program, rank, p2p_batches), strict=True
    )
    for instruction, before, (_, messages) in counts:
        alive, waiting = map(list, before)
        if instruction.backward is not None:
            own = waiting if instruction.op is Op.W else alive
            own[instruction.backward.chunk] -= 1
        yield LiveCounts(tuple(alive), tuple(waiting), messages)


def _counts_before(program: PipelineProgram, rank: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield the counts before each instruction: awaiting backward, awaiting weight gradients."""
    alive, waiting = [0] * program.chunks_per_rank, [0] * program.chunks_per_rank
    for instruction in program.instructions[rank]:
        yield tuple(alive), tuple(waiting)
        if instruction.forward is not None:
            alive[instruction.forward.chunk] += 1
        if instruction.backward is not None:
            chunk = instruction.backward.chunk
            alive[chunk] -= instruction.op is not Op.W
            waiting[chunk] += (instruction.op is Op.I) - (instruction.op is Op.W)


def _messages(program: PipelineProgram, rank: int, p2p_batches: Sequence[P2PBatch]) -> Iterator[tuple[int, int]]:
    """Yield the numbers of messages before each instruction and while it runs."""
    # Three kinds: received ahead, just sent, and results for another chunk of this rank.
    here = 0
    for p2p_batch, instruction in zip(p2p_batches, program.instructions[rank], strict=False):
        halves = tuple(iter_halves(program.placement, rank, instruction))
        here += len(p2p_batch.receives)
        taken = len(p2p_batch.required_receives)
        taken += sum(half.source is not None and half.source.rank == rank for half in halves)
        sent = len(p2p_batch.sends)
        yield here + sent, here + sent - taken
        here += sum(half.target is not None and half.target.rank == rank for half in halves) - taken


def first_use(program: PipelineProgram, rank: int, stages: Iterable[int]) -> int:
    """Return the index of the first instruction of `rank` that uses weights of `stages`: a forward."""
    return next(_uses(program, rank, stages))


def last_use(program: PipelineProgram, rank: int, stages: Iterable[int]) -> int:
    """Return the index of the last instruction of `rank` that adds to gradients of weights of `stages`."""
    # Every backward of a chunk adds: I adds what autograd computes directly (norms, routers), W the delayed products.
    *_, last = _uses(program, rank, stages)
    return last


def first_use_on_any_rank(program: PipelineProgram, stages: Iterable[int]) -> int:
    """Return the smallest `first_use` over the ranks of `stages`: equal on all, so it can order their collectives."""
    return min(first_use(program, rank, stages) for rank in _ranks_with(program, stages))


def last_use_on_any_rank(program: PipelineProgram, stages: Iterable[int]) -> int:
    """Return the largest `last_use` over the ranks of `stages`."""
    return max(last_use(program, rank, stages) for rank in _ranks_with(program, stages))


def _ranks_with(program: PipelineProgram, stages: Iterable[int]) -> set[int]:
    return {place.rank for stage in stages for place in program.placement.locations_of_stage(stage)}


def _uses(program: PipelineProgram, rank: int, stages: Iterable[int]) -> Iterator[int]:
    wanted = set(stages)
    for index, instruction in enumerate(program.instructions[rank]):
        if any(
            program.placement.stage_at(StageLocation(rank, work.chunk)) in wanted
            for work in instruction.chunk_micro_batches
        ):
            yield index
