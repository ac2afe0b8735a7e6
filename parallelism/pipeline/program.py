"""A pipeline program: for each rank, the list of what it computes. Nothing else decides order at run time.

Schedules write programs with `RankProgramWriter`, which counts micro-batches, so that a schedule reads as a list of steps.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum

from .placement import Direction, PlacementStyle, StagePlacement


class InvalidProgramError(ValueError):
    """A program that would compute the wrong thing, or never end: what is wrong, at which rank and instruction."""


class Op(StrEnum):
    """What an instruction computes."""

    F = "F"  # forward
    B = "B"  # backward: gradients of inputs and of weights
    I = "I"  # noqa: E741 -- the field's letter: backward of inputs only; weight gradients stay pending until W
    W = "W"  # the weight gradients that an earlier I left pending
    FB = "FB"  # the forward of one micro-batch and the whole backward of another, overlapped


@dataclass(frozen=True, slots=True)
class ChunkMicroBatch:
    """One micro-batch in one chunk of the rank that the work is listed for.

    Micro-batches count from 0. Under a bidirectional placement each direction has its own count, so
    micro-batch 3 of chunk 0 and micro-batch 3 of chunk 1 are different data; see `PipelineProgram.global_micro_batch_index`.
    """

    chunk: int
    micro_batch: int


@dataclass(frozen=True, slots=True)
class Instruction:
    """One step of a rank: `forward` for F and FB, `backward` for B, I, W and FB.

    The two works of an FB do not depend on each other: they may run in turns, or as F and then B.
    """

    op: Op
    forward: ChunkMicroBatch | None = None
    backward: ChunkMicroBatch | None = None

    def __post_init__(self) -> None:
        given = (self.forward is not None, self.backward is not None)
        if given != (self.op in (Op.F, Op.FB), self.op is not Op.F):
            raise ValueError(f"{self.op} with forward = {self.forward} and backward = {self.backward}")

    @property
    def chunk_micro_batches(self) -> tuple[ChunkMicroBatch, ...]:
        """The one or two works, forward first."""
        return tuple(work for work in (self.forward, self.backward) if work is not None)

    def __str__(self) -> str:
        return f"{self.op} " + " & ".join(
            f"chunk {work.chunk} micro-batch {work.micro_batch}" for work in self.chunk_micro_batches
        )


def describe_instruction(rank: int, index: int, instruction: Instruction) -> str:
    """An instruction as errors name it."""
    return f"rank {rank}, instruction {index} ({instruction})"


@dataclass(frozen=True)
class PipelineProgram:
    """What every rank computes for one global batch, in order."""

    schedule: str
    placement: StagePlacement
    num_micro_batches: int
    """N, those of a bidirectional program's two directions taken together."""
    instructions: tuple[tuple[Instruction, ...], ...]
    """Of each rank."""

    @property
    def ranks(self) -> int:
        """P."""
        return self.placement.ranks

    @property
    def chunks_per_rank(self) -> int:
        """Stages a rank holds."""
        return self.placement.chunks_per_rank

    def micro_batches_in_chunk(self, chunk: int) -> int:
        """How many micro-batches visit `chunk`: all, or in a bidirectional program the half of its direction."""
        if self.placement.style is not PlacementStyle.BIDIRECTIONAL:
            return self.num_micro_batches
        return self.num_micro_batches // 2

    def global_micro_batch_index(self, work: ChunkMicroBatch) -> int:
        """Which of the global batch's N micro-batches `work` is on: those that go up first, then those that go down."""
        bidirectional = self.placement.style is PlacementStyle.BIDIRECTIONAL
        down = bidirectional and self.placement.direction_of_chunk(work.chunk) is Direction.PREV
        return work.micro_batch + (self.micro_batches_in_chunk(0) if down else 0)


def count_in_flight(program: PipelineProgram) -> tuple[tuple[int, ...], ...]:
    """Of each rank, how many chunk activations are alive while each of its instructions runs.

    One (chunk, micro-batch) is alive from the start of its F or FB to the end of its B or FB; where the backward is
    split to the end of its W, because weight gradients are made from the inputs that the forward kept.
    """
    return tuple(_alive(instructions) for instructions in program.instructions)


def _alive(instructions: tuple[Instruction, ...]) -> tuple[int, ...]:
    counts, alive = [], 0
    for instruction in instructions:
        alive += instruction.forward is not None
        counts.append(alive)
        alive -= instruction.op in (Op.B, Op.W, Op.FB)
    return tuple(counts)


class RankProgramWriter:
    """Appends instructions; each call takes the chunk's next micro-batch."""

    def __init__(self, chunks: int) -> None:
        self._forwards = [0] * chunks
        self._backwards = [0] * chunks
        self._pending: deque[ChunkMicroBatch] = deque()
        self._written: list[Instruction] = []

    def append_forward(self, chunk: int = 0) -> None:
        """F."""
        self._written.append(Instruction(Op.F, forward=_next(self._forwards, chunk)))

    def append_backward(self, chunk: int = 0) -> None:
        """B."""
        self._written.append(Instruction(Op.B, backward=_next(self._backwards, chunk)))

    def append_input_gradient(self, chunk: int = 0) -> None:
        """I: the same micro-batch's weight gradients become pending."""
        work = _next(self._backwards, chunk)
        self._pending.append(work)
        self._written.append(Instruction(Op.I, backward=work))

    def append_weight_gradient(self) -> None:
        """W of what has been pending longest."""
        self._written.append(Instruction(Op.W, backward=self._pending.popleft()))

    def append_forward_backward(self, forward: int, backward: int) -> None:
        """FB: the forward of chunk `forward` overlapped with the backward of chunk `backward`."""
        works = _next(self._forwards, forward), _next(self._backwards, backward)
        self._written.append(Instruction(Op.FB, *works))

    def instructions(self) -> tuple[Instruction, ...]:
        """All that has been written."""
        return tuple(self._written)


def _next(counts: list[int], chunk: int) -> ChunkMicroBatch:
    work = ChunkMicroBatch(chunk, counts[chunk])
    counts[chunk] += 1
    return work
