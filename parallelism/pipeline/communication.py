"""P2P messages of a program, derived from it: the one source for check, simulation and execution."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate

from .placement import Direction, StageLocation, StagePlacement
from .program import ChunkMicroBatch, Instruction, Op, PipelineProgram


class P2PTensorKind(StrEnum):
    """Kind of tensor in a message."""

    ACTIVATION = "activation"  # the output of a forward, input of the next stage's
    GRADIENT = "gradient"  # gradient of a stage's input, which is the output gradient of the stage before it


@dataclass(frozen=True, slots=True)
class P2POp:
    """One message between two ranks. Tensors that stay on a rank (the turn of a V, one rank) are not messages."""

    tensor_kind: P2PTensorKind
    direction: Direction
    """Direction of the message, which selects the process group."""
    source: StageLocation
    target: StageLocation
    micro_batch: int

    @property
    def producer(self) -> ChunkMicroBatch:
        """Chunk and micro-batch on the source rank whose result the message carries."""
        return ChunkMicroBatch(self.source.chunk, self.micro_batch)

    @property
    def consumer(self) -> ChunkMicroBatch:
        """Chunk and micro-batch on the target rank that needs the message."""
        return ChunkMicroBatch(self.target.chunk, self.micro_batch)

    def __str__(self) -> str:
        return (
            f"{self.tensor_kind} of micro-batch {self.micro_batch} from rank {self.source.rank} chunk "
            f"{self.source.chunk} to rank {self.target.rank} chunk {self.target.chunk}"
        )


@dataclass(frozen=True, slots=True)
class P2PBatch:
    """Messages that a rank posts between two instructions, in this order; each direction is one batch."""

    sends: tuple[P2POp, ...]
    receives: tuple[P2POp, ...]
    required_receives: tuple[P2POp, ...]
    """Messages that the second of the two instructions waits for, received in this batch or an earlier one."""


_OpsByBatch = defaultdict[tuple[int, int], list[P2POp]]  # by rank and batch number


def derive_p2p_batches(program: PipelineProgram) -> tuple[tuple[P2PBatch, ...], ...]:
    """Return the P2P batches of each rank: batch k is before instruction k, the last one after the last instruction.

    The rendezvous model: a rank posts batch k when instruction k - 1 has ended. In each direction its batches form a
    queue: a batch completes when each of its messages is in an open batch at its other end too, and only then the next
    one opens. Instruction k waits for the batches that contain its inputs, and for no other.

    The result of an instruction is sent in the batch after it. Its inputs are received ahead: in the batch after the
    last one that sent, or needed, a message in the same direction. Between two ranks and in one direction, messages
    have the same order at both ends.

    The program must be complete, which `verify_program` proves.
    """
    # The model is NCCL's: a batch is one group of sends and receives on one stream, which ends when all have matched.
    # Receiving ahead lets results and the next inputs travel together, and an instruction find its inputs ready.
    # Further ahead gains nothing: the buffer would only wait, and on NCCL the receive would keep its SMs.
    producers: dict[P2POp, int] = {}
    consumers: dict[P2POp, int] = {}
    for rank, instructions in enumerate(program.instructions):
        for index, instruction in enumerate(instructions):
            for half in iter_halves(program.placement, rank, instruction):
                producers.update((op, index) for op in _p2p_ops(program.placement, half, half.here, half.target))
                consumers.update((op, index) for op in _p2p_ops(program.placement, half, half.source, half.here))
    sends, receives, needs = (_OpsByBatch(list) for _ in range(3))
    arriving_ops: defaultdict[tuple[int, Direction], list[P2POp]] = defaultdict(list)
    send_indices: defaultdict[tuple[int, Direction], list[int]] = defaultdict(list)
    # In the order of production: a message that is needed later may be produced earlier, and both ends must agree
    # without tags.
    for p2p_op in sorted(producers, key=lambda p2p_op: (producers[p2p_op], consumers[p2p_op])):
        sends[p2p_op.source.rank, producers[p2p_op] + 1].append(p2p_op)
        needs[p2p_op.target.rank, consumers[p2p_op]].append(p2p_op)
        send_indices[p2p_op.source.rank, p2p_op.direction].append(producers[p2p_op])
        arriving_ops[p2p_op.target.rank, p2p_op.direction].append(p2p_op)
    for (rank, direction), arriving in arriving_ops.items():
        indices = _receive_batch_indices([consumers[p2p_op] for p2p_op in arriving], send_indices[rank, direction])
        for p2p_op, index in zip(arriving, indices, strict=True):
            receives[rank, index].append(p2p_op)
    return tuple(
        tuple(
            P2PBatch(tuple(sends[rank, index]), tuple(receives[rank, index]), tuple(needs[rank, index]))
            for index in range(len(instructions) + 1)
        )
        for rank, instructions in enumerate(program.instructions)
    )


def _receive_batch_indices(needed: Sequence[int], sending: Sequence[int]) -> Iterator[int]:
    """Yield the batch in which each message of one direction is received.

    `needed` is the instruction that needs each message, in the order of arrival; `sending` are the instructions of this
    rank that send in this direction, ascending.
    """
    # A message that arrives before another that is needed earlier must be received with that one at the latest.
    due = list(accumulate(reversed(needed), min))[::-1]
    batch_index, last_due = 0, -1
    for index in due:
        if index != last_due:
            last_sent = sending[position - 1] if (position := bisect_left(sending, index)) else -1
            batch_index, last_due = max(last_due, last_sent) + 1, index
        yield batch_index


@dataclass(frozen=True, slots=True)
class InstructionHalf:
    """The forward or backward of an instruction, and the stages that its input comes from and its result goes to."""

    tensor_kind: P2PTensorKind
    """Kind of the input and of the result."""
    work: ChunkMicroBatch
    here: StageLocation
    source: StageLocation | None
    """None in the first stage of its direction."""
    target: StageLocation | None
    """None in the last stage of its direction."""

    @staticmethod
    def at(
        placement: StagePlacement, rank: int, tensor_kind: P2PTensorKind, work: ChunkMicroBatch
    ) -> "InstructionHalf":
        """Return the forward (of activations) or backward (of gradients) of `work` on `rank`."""
        here = StageLocation(rank, work.chunk)
        ends = placement.previous_location(here), placement.next_location(here)
        source, target = ends if tensor_kind is P2PTensorKind.ACTIVATION else reversed(ends)
        return InstructionHalf(tensor_kind, work, here, source, target)


def iter_halves(placement: StagePlacement, rank: int, instruction: Instruction) -> Iterator[InstructionHalf]:
    """Yield the forward and the backward of `instruction`; W is neither, for it takes and gives nothing."""
    if instruction.forward is not None:
        yield InstructionHalf.at(placement, rank, P2PTensorKind.ACTIVATION, instruction.forward)
    if instruction.backward is not None and instruction.op is not Op.W:
        yield InstructionHalf.at(placement, rank, P2PTensorKind.GRADIENT, instruction.backward)


def _p2p_ops(
    placement: StagePlacement, half: InstructionHalf, source: StageLocation | None, target: StageLocation | None
) -> Iterator[P2POp]:
    """Yield the message from `source` to `target`, one of which is the place of `half`, if there is one."""
    if source is None or target is None or source.rank == target.rank:
        return
    if half.tensor_kind is P2PTensorKind.ACTIVATION:
        direction = placement.direction_of_chunk(source.chunk)
    else:
        direction = placement.direction_of_chunk(target.chunk).opposite
    yield P2POp(half.tensor_kind, direction, source, target, half.work.micro_batch)
