"""What travels between ranks, derived from a program: the one source for check, simulation and execution."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate

from .placement import Direction, StageLocation
from .program import ChunkMicroBatch, Instruction, Op, PipelineProgram


class P2PTensorKind(StrEnum):
    """What a message holds."""

    ACTIVATION = "activation"  # the output of a forward, input of the next stage's
    GRADIENT = "gradient"  # of a stage's input: the output gradient of the stage before it


@dataclass(frozen=True, slots=True)
class P2POp:
    """One message between two ranks. What stays on a rank (the turn of a V, a pipeline of one rank) is no edge."""

    tensor_kind: P2PTensorKind
    direction: Direction
    """The process group it belongs to."""
    source: StageLocation
    target: StageLocation
    micro_batch: int

    @property
    def producer(self) -> ChunkMicroBatch:
        """The work whose result it carries, in the source's numbering of chunks."""
        return ChunkMicroBatch(self.source.chunk, self.micro_batch)

    @property
    def consumer(self) -> ChunkMicroBatch:
        """The work that needs it, in the target's numbering of chunks."""
        return ChunkMicroBatch(self.target.chunk, self.micro_batch)

    def __str__(self) -> str:
        return (
            f"{self.tensor_kind} of micro-batch {self.micro_batch} from rank {self.source.rank} chunk {self.source.chunk}"
            f" to rank {self.target.rank} chunk {self.target.chunk}"
        )


@dataclass(frozen=True, slots=True)
class P2PBatch:
    """What a rank posts between two instructions, in this order; what goes in one direction is one batch."""

    sends: tuple[P2POp, ...]
    receives: tuple[P2POp, ...]
    required_receives: tuple[P2POp, ...]
    """What the second of the two instructions waits for: received in this commit or an earlier one."""


_Posts = defaultdict[tuple[int, int], list[P2POp]]  # by rank and commit


def derive_p2p_batches(program: PipelineProgram) -> tuple[tuple[P2PBatch, ...], ...]:
    """Of each rank, its commits: number k lies before instruction k, the last one after the last instruction.

    The rendezvous model: commit k of a rank is posted when instruction k - 1 has ended. In each direction a rank's
    commits are a queue of batches: a batch is complete when each of its messages is in an open batch at its other end
    too, and only then does the next one open. Instruction k waits for the batches that bring what it needs, and for no
    other.

    What an instruction makes is sent in the commit after it. What an instruction needs is received ahead: in the commit
    after the last one that sent, or needed, a message in the same direction. So results and the next inputs travel
    together, and the inputs of one instruction a direction are received ahead. Messages that are made in another order
    than the target needs them are received in the order they are made. Between two ranks and in one direction the order
    is therefore the same at both ends: a message is known by its number.

    The program must be complete, which `check` proves.
    """
    makers = {edge: index for index, edge in _each(program, _outgoing)}
    users = {edge: index for index, edge in _each(program, _incoming)}
    sends, receives, needs = (_Posts(list) for _ in range(3))
    lanes: defaultdict[tuple[int, Direction], list[P2POp]] = defaultdict(list)
    leaving: defaultdict[tuple[int, Direction], list[int]] = defaultdict(list)
    for edge in sorted(makers, key=lambda edge: (makers[edge], users[edge])):
        sends[edge.source.rank, makers[edge] + 1].append(edge)
        needs[edge.target.rank, users[edge]].append(edge)
        leaving[edge.source.rank, edge.direction].append(makers[edge])
        lanes[edge.target.rank, edge.direction].append(edge)
    for (rank, direction), arriving in lanes.items():
        commits = _ahead([users[edge] for edge in arriving], leaving[rank, direction])
        for edge, commit in zip(arriving, commits, strict=True):
            receives[rank, commit].append(edge)
    return tuple(
        tuple(
            P2PBatch(tuple(sends[rank, index]), tuple(receives[rank, index]), tuple(needs[rank, index]))
            for index in range(len(instructions) + 1)
        )
        for rank, instructions in enumerate(program.instructions)
    )


def _ahead(needed: Sequence[int], sending: Sequence[int]) -> Iterator[int]:
    """The commit in which each message of one direction is received.

    `needed`: the instruction that needs each message, in the order of arrival. `sending`: the instructions of this rank
    that send in this direction, ascending.
    """
    # What arrives before a message that is needed earlier has to be received with it at the latest.
    due = list(accumulate(reversed(needed), min))[::-1]
    commit, last_due = 0, -1
    for index in due:
        if index != last_due:
            last_sent = sending[position - 1] if (position := bisect_left(sending, index)) else -1
            commit, last_due = max(last_due, last_sent) + 1, index
        yield commit


def _each(
    program: PipelineProgram, ends: Callable[[PipelineProgram, int, Instruction], Iterator[P2POp]]
) -> Iterator[tuple[int, P2POp]]:
    """Every edge with the index of the instruction at one of its ends."""
    for rank, instructions in enumerate(program.instructions):
        for index, instruction in enumerate(instructions):
            for edge in ends(program, rank, instruction):
                yield index, edge


def _outgoing(program: PipelineProgram, rank: int, instruction: Instruction) -> Iterator[P2POp]:
    """What `instruction` makes for another rank."""
    placement, forward, backward = program.placement, instruction.forward, instruction.backward
    if forward is not None:
        source = StageLocation(rank, forward.chunk)
        yield from _edge(
            program, P2PTensorKind.ACTIVATION, source, placement.next_location(source), forward.micro_batch
        )
    if backward is not None and instruction.op is not Op.W:
        source = StageLocation(rank, backward.chunk)
        yield from _edge(
            program, P2PTensorKind.GRADIENT, source, placement.previous_location(source), backward.micro_batch
        )


def _incoming(program: PipelineProgram, rank: int, instruction: Instruction) -> Iterator[P2POp]:
    """What `instruction` needs from another rank."""
    placement, forward, backward = program.placement, instruction.forward, instruction.backward
    if forward is not None:
        target = StageLocation(rank, forward.chunk)
        yield from _edge(
            program, P2PTensorKind.ACTIVATION, placement.previous_location(target), target, forward.micro_batch
        )
    if backward is not None and instruction.op is not Op.W:
        target = StageLocation(rank, backward.chunk)
        yield from _edge(program, P2PTensorKind.GRADIENT, placement.next_location(target), target, backward.micro_batch)


def _edge(
    program: PipelineProgram,
    payload: P2PTensorKind,
    source: StageLocation | None,
    target: StageLocation | None,
    micro_batch: int,
) -> Iterator[P2POp]:
    if source is None or target is None or source.rank == target.rank:
        return
    if payload is P2PTensorKind.ACTIVATION:
        direction = program.placement.direction_of_chunk(source.chunk)
    else:
        direction = program.placement.direction_of_chunk(target.chunk).opposite
    yield P2POp(payload, direction, source, target, micro_batch)
