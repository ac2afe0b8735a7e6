"""Pipeline programs: one list of instructions per rank, which alone decides the order of execution.

Schedules write ops and chunks; `number_micro_batches` counts the micro-batches.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum

from .placement import Direction, PlacementStyle, StagePlacement


class InvalidProgramError(ValueError):
    """A program with a wrong result or a deadlock; the message names rank and instruction."""


class Op(StrEnum):
    """Operation of an instruction."""

    F = "F"  # forward
    B = "B"  # backward: gradients of inputs and of weights
    I = "I"  # noqa: E741 -- the field's letter: backward of inputs only; weight gradients stay pending until W
    W = "W"  # the weight gradients that an earlier I left pending
    FB = "FB"  # the forward of one micro-batch and the whole backward of another, overlapped


@dataclass(frozen=True, slots=True)
class ChunkMicroBatch:
    """One micro-batch in one chunk of a rank.

    Micro-batches count from 0. A bidirectional placement counts each direction separately: micro-batch 3 of chunk 0 and
    micro-batch 3 of chunk 1 are different data; see `PipelineProgram.global_micro_batch_index`.
    """

    chunk: int
    micro_batch: int


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a rank: `forward` for F and FB, `backward` for B, I, W and FB.

    The two halves of an FB do not depend on each other: they may run interleaved, or as F and then B.
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
        """The one or two (chunk, micro-batch) of the instruction, forward first."""
        return tuple(work for work in (self.forward, self.backward) if work is not None)

    @property
    def op_and_chunks(self) -> tuple[Op, int | None, int | None]:
        """Op, and the chunks of its forward and backward, without the micro-batches."""
        forward, backward = self.forward, self.backward
        return self.op, None if forward is None else forward.chunk, None if backward is None else backward.chunk

    def __str__(self) -> str:
        return f"{self.op} " + " & ".join(
            f"chunk {work.chunk} micro-batch {work.micro_batch}" for work in self.chunk_micro_batches
        )


def describe_instruction(rank: int, index: int, instruction: Instruction) -> str:
    """Return the description of an instruction for error messages."""
    return f"rank {rank}, instruction {index} ({instruction})"


@dataclass(frozen=True)
class PipelineProgram:
    """Instructions of every rank for one global batch."""

    schedule: str
    placement: StagePlacement
    num_micro_batches: int
    """N, the micro-batches of both directions together."""
    instructions: tuple[tuple[Instruction, ...], ...]
    """Instructions by rank."""

    @property
    def ranks(self) -> int:
        """P, the number of pipeline ranks."""
        return self.placement.ranks

    @property
    def chunks_per_rank(self) -> int:
        """Stages per rank."""
        return self.placement.chunks_per_rank

    def micro_batches_in_chunk(self, chunk: int) -> int:
        """Return the number of micro-batches that visit `chunk`: N, or N / 2 in a bidirectional program."""
        if self.placement.style is not PlacementStyle.BIDIRECTIONAL:
            return self.num_micro_batches
        return self.num_micro_batches // 2

    def global_micro_batch_index(self, work: ChunkMicroBatch) -> int:
        """Return the index of the micro-batch among all N: first those of chunk 0's direction, then the others."""
        bidirectional = self.placement.style is PlacementStyle.BIDIRECTIONAL
        goes_back = bidirectional and self.placement.direction_of_chunk(work.chunk) is Direction.PREV
        return work.micro_batch + (self.micro_batches_in_chunk(0) if goes_back else 0)


def program_as_dict(program: PipelineProgram) -> dict[str, object]:
    """Return the program as plain values, for JSON. `pp` is the number of pipeline ranks."""
    return {
        "schedule": program.schedule,
        "pp": program.ranks,
        "micro_batches": program.num_micro_batches,
        "ranks": [[_instruction_as_dict(instruction) for instruction in row] for row in program.instructions],
    }


def _instruction_as_dict(instruction: Instruction) -> dict[str, object]:
    forward, backward = instruction.forward, instruction.backward
    if forward is not None and backward is not None:
        return {"op": instruction.op.value, "forward": asdict(forward), "backward": asdict(backward)}
    return {"op": instruction.op.value, **asdict(instruction.chunk_micro_batches[0])}


def count_in_flight(program: PipelineProgram) -> tuple[tuple[int, ...], ...]:
    """Return for each rank the number of live chunk activations during each of its instructions.

    One (chunk, micro-batch) is live from the start of its F or FB to the end of its B, FB or W.
    """
    return tuple(_alive(instructions) for instructions in program.instructions)


def _alive(instructions: tuple[Instruction, ...]) -> tuple[int, ...]:
    counts, alive = [], 0
    for instruction in instructions:
        alive += instruction.forward is not None
        counts.append(alive)
        # Not at I: the weight gradients of W are computed from the inputs that the forward kept.
        alive -= instruction.op in (Op.B, Op.W, Op.FB)
    return tuple(counts)


OpAndChunks = tuple[Op, *tuple[int, ...]]
"""An instruction as a schedule writes it: F, B or I and a chunk, FB and the chunks of both halves, W alone."""


def number_micro_batches(written: Iterable[OpAndChunks]) -> Iterator[Instruction]:
    """Yield the instructions of one rank: each takes its chunk's next micro-batch, W the one pending longest."""
    forwards, backwards = Counter[int](), Counter[int]()
    pending: deque[ChunkMicroBatch] = deque()
    for op, *chunks in written:
        forward = _next(forwards, chunks[0]) if op in (Op.F, Op.FB) else None
        if op is Op.F:
            backward = None
        else:
            backward = pending.popleft() if op is Op.W else _next(backwards, chunks[-1])
            if op is Op.I:
                pending.append(backward)
        yield Instruction(op, forward, backward)


def _next(counts: Counter[int], chunk: int) -> ChunkMicroBatch:
    counts[chunk] += 1
    return ChunkMicroBatch(chunk, counts[chunk] - 1)
