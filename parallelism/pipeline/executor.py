"""Execution of a program on one rank: exactly its instructions, in order, for every schedule.

Independent of the model: stages receive and return tensors. Their forward and backward are resumable computations,
which run to completion alone or interleaved in pairs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor

from ...comm.async_comm import AsyncWork
from ...comm.errors import CollectiveError
from ...comm.groups import Group
from ...comm.p2p import P2PChannel, P2PReceive, P2PSend, build_p2p_channel
from ...comm.streams import DeviceStreams
from ...comm.trace import NULL_RECORDER, PIPELINE_WAIT, SpanRecorder, TimelineTrack
from ..weight_grad import DelayedWeightGradients
from .communication import InstructionHalf, P2PBatch, P2POp, P2PTensorKind, derive_p2p_batches, iter_halves
from .instruction import Resumable, run_instruction
from .placement import Direction, StageLocation
from .program import ChunkMicroBatch, Instruction, PipelineProgram, describe_instruction


class PipelineStage(Protocol):
    """One chunk of a rank. Micro-batches have the numbers of `PipelineProgram.global_micro_batch_index`."""

    def forward(self, micro_batch: int, received: Tensor | None) -> Resumable[Tensor | None]:
        """Compute the output for the next stage (last: None) from that of the previous one (first: None)."""
        ...

    def backward(
        self, micro_batch: int, received: Tensor | None, weights: DelayedWeightGradients
    ) -> Resumable[Tensor | None]:
        """Compute the gradient of the input from that of the output; delayed weight gradients go to `weights`."""
        ...

    def empty_activation(self, micro_batch: int) -> Tensor:
        """Return an empty tensor for an activation, or its gradient, between stages."""
        ...


class InstructionListener(Protocol):
    """Callbacks before and after each instruction of this rank, by its index."""

    def before_instruction(self, instruction: int) -> None:
        """Run before the instruction."""
        ...

    def after_instruction(self, instruction: int) -> None:
        """Run after the instruction, when its messages are posted."""
        ...


def build_p2p_channels(
    next_group: Group,
    prev_group: Group,
    device: torch.device,
    recorder: SpanRecorder = NULL_RECORDER,
    streams: DeviceStreams | None = None,
) -> dict[Direction, P2PChannel]:
    """Return a channel per direction; none for one pipeline rank. `streams` defaults to those of `device`.

    Both groups are of all pipeline ranks in order, and must be two: `ProcessGroups.create` says why.
    """
    if next_group.size == 1:
        return {}
    directions = (
        (Direction.NEXT, next_group, TimelineTrack.P2P_NEXT),
        (Direction.PREV, prev_group, TimelineTrack.P2P_PREV),
    )
    return {
        direction: build_p2p_channel(group, device, recorder, track, streams) for direction, group, track in directions
    }


_WARM_UP_MESSAGE = "first message between neighbors"


@dataclass(frozen=True)
class PipelineExecutor:
    """Executor of one pipeline rank's part of a program."""

    program: PipelineProgram
    pp_rank: int
    """Pipeline rank."""
    channels: Mapping[Direction, P2PChannel]
    """Channels by direction; empty for one pipeline rank."""
    global_ranks: tuple[int, ...]
    """Global ranks of the pipeline ranks, in order."""
    overlap: bool = True
    """Interleave the two halves of an FB; if False, run the forward first. The results are equal."""
    recorder: SpanRecorder = NULL_RECORDER

    @cached_property
    def p2p_batches(self) -> tuple[P2PBatch, ...]:
        """P2P batches of this rank."""
        return derive_p2p_batches(self.program)[self.pp_rank]

    def run(self, stages: Sequence[PipelineStage], listener: InstructionListener | None = None) -> None:
        """Run every instruction on `stages`, which are indexed by chunk.

        Raises `CollectiveError` for a failed message; it names instruction, message and peer.
        """
        run = _Run(self, stages)
        run.post(self.p2p_batches[0])
        for index, instruction in enumerate(self.program.instructions[self.pp_rank]):
            if listener is not None:
                listener.before_instruction(index)
            run.instruction(index, instruction)
            # Before the listener: it may start a reduce-scatter, whose first call on NCCL blocks the host until all
            # members call it, and a member may need these messages to get there.
            run.post(self.p2p_batches[index + 1])
            if listener is not None:
                listener.after_instruction(index)
        run.finish()

    def connect_neighbors(self, device: torch.device) -> None:
        """Exchange a message of one element on `device` with each neighbor. Collective over the pipeline."""
        # NCCL connects two ranks at their first message and blocks the host until both have posted it. A schedule posts
        # receives ahead: rank 0's first one, of a gradient, would block it before the forward that this gradient needs.
        # All pairs of a direction connect in one batch: two ranks that are both next and previous to each other (a loop
        # of two) exchange their connections in one message, whose length must be equal at both ends.
        for direction, channel in self.channels.items():
            messages = partial(_in_direction, direction)
            sent = {op.target.rank for batch in self.p2p_batches for op in messages(batch.sends)}
            awaited = {op.source.rank for batch in self.p2p_batches for op in messages(batch.receives)}
            element = partial(torch.zeros, 1, device=device)
            channel.post(
                [P2PSend(_WARM_UP_MESSAGE, element(), self.global_ranks[rank]) for rank in sorted(sent)],
                [P2PReceive(_WARM_UP_MESSAGE, element, self.global_ranks[rank]) for rank in sorted(awaited)],
            )
            channel.wait_for_sends()


def _in_direction(direction: Direction, p2p_ops: Iterable[P2POp]) -> list[P2POp]:
    return [p2p_op for p2p_op in p2p_ops if p2p_op.direction is direction]


class _Run:
    """State of one run of a program."""

    def __init__(self, executor: PipelineExecutor, stages: Sequence[PipelineStage]) -> None:
        self._executor = executor
        self.program, self.rank = executor.program, executor.pp_rank
        self.stages = stages
        self._arriving: dict[tuple[P2PTensorKind, ChunkMicroBatch], tuple[P2POp, AsyncWork[Tensor]]] = {}
        self._ready: dict[tuple[P2PTensorKind, ChunkMicroBatch], Tensor] = {}
        """Inputs that have arrived, by the chunk and micro-batch that need them."""
        self._leaving: dict[tuple[P2PTensorKind, ChunkMicroBatch], Tensor] = {}
        """Results for other ranks that are not sent yet, by the chunk and micro-batch that produced them."""
        self.pending_weights: dict[ChunkMicroBatch, DelayedWeightGradients] = {}

    def post(self, p2p_batch: P2PBatch) -> None:
        """Post the sends and receives of a batch."""
        for direction, channel in self._executor.channels.items():
            receives = _in_direction(direction, p2p_batch.receives)
            arriving = channel.post(
                [self._outgoing(p2p_op) for p2p_op in _in_direction(direction, p2p_batch.sends)],
                [P2PReceive(p2p_op, self._buffer(p2p_op), self._global(p2p_op.source)) for p2p_op in receives],
            )
            for p2p_op, message in zip(receives, arriving, strict=True):
                self._arriving[p2p_op.tensor_kind, p2p_op.consumer] = (p2p_op, message)

    def instruction(self, index: int, instruction: Instruction) -> None:
        """Wait for the inputs of an instruction, then compute it."""
        overlap, recorder = self._executor.overlap, self._executor.recorder
        forward, backward = (
            None if work is None else _ChunkRun(self, work) for work in (instruction.forward, instruction.backward)
        )
        try:
            # All inputs before it starts: its span then holds no pipeline wait, which has a separate span.
            for half in iter_halves(self.program.placement, self.rank, instruction):
                self._wait_for_input(half)
            with recorder.span(TimelineTrack.INSTRUCTION, instruction.op, instruction):
                run_instruction(instruction.op, forward, backward, overlap=overlap)
        except CollectiveError as failure:
            raise CollectiveError(f"{describe_instruction(self.rank, index, instruction)}: {failure}") from failure

    def finish(self) -> None:
        """Wait until every send has finished."""
        for channel in self._executor.channels.values():
            channel.wait_for_sends()

    def _wait_for_input(self, half: InstructionHalf) -> None:
        """Wait for the tensor that another rank sends for `half`."""
        if half.source is None or half.source.rank == self.rank:
            return
        p2p_op, message = self._arriving.pop((half.tensor_kind, half.work))
        try:
            with self._executor.recorder.span(TimelineTrack.INSTRUCTION, PIPELINE_WAIT, p2p_op):
                self._ready[half.tensor_kind, half.work] = message.wait()
        except CollectiveError as failure:
            raise CollectiveError(f"waiting for the {p2p_op}: {failure}") from failure

    def take_input(self, half: InstructionHalf) -> Tensor | None:
        """Return the input of `half`, which has arrived; None in the first stage of its direction."""
        return None if half.source is None else self._ready.pop((half.tensor_kind, half.work))

    def deliver(self, half: InstructionHalf, made: Tensor | None) -> None:
        """Pass a result to another chunk of this rank, or keep it to be sent."""
        if half.target is None:
            return
        assert made is not None
        if half.target.rank == self.rank:
            self._ready[half.tensor_kind, ChunkMicroBatch(half.target.chunk, half.work.micro_batch)] = made
        else:
            self._leaving[half.tensor_kind, half.work] = made.contiguous()

    def _outgoing(self, p2p_op: P2POp) -> P2PSend:
        return P2PSend(p2p_op, self._leaving.pop((p2p_op.tensor_kind, p2p_op.producer)), self._global(p2p_op.target))

    def _buffer(self, p2p_op: P2POp) -> Callable[[], Tensor]:
        stage, micro_batch = self.stages[p2p_op.target.chunk], self.program.global_micro_batch_index(p2p_op.consumer)
        return lambda: stage.empty_activation(micro_batch)

    def _global(self, place: StageLocation) -> int:
        return self._executor.global_ranks[place.rank]


@dataclass(frozen=True)
class _ChunkRun:
    """One micro-batch in one chunk of a run, as `run_instruction` needs it."""

    run: _Run
    work: ChunkMicroBatch

    def forward(self) -> Resumable[None]:
        """Run the forward of a micro-batch and keep its output for the next stage."""
        half = self._half(P2PTensorKind.ACTIVATION)
        # No variable here may hold the input: it is freed when the stage has used it.
        output = yield from self._stage.forward(self._micro_batch, self.run.take_input(half))
        self.run.deliver(half, output)

    def backward(self, *, deferred: bool) -> Resumable[None]:
        """Run the backward of a micro-batch and keep the gradient of its input for the previous stage."""
        half, weights = self._half(P2PTensorKind.GRADIENT), DelayedWeightGradients(deferred=deferred)
        if deferred:
            self.run.pending_weights[self.work] = weights
        grad = yield from self._stage.backward(self._micro_batch, self.run.take_input(half), weights)
        self.run.deliver(half, grad)

    def weight_gradients(self) -> None:
        """Compute the weight gradients that an I left."""
        self.run.pending_weights.pop(self.work).flush()

    @property
    def _stage(self) -> PipelineStage:
        return self.run.stages[self.work.chunk]

    @property
    def _micro_batch(self) -> int:
        return self.run.program.global_micro_batch_index(self.work)

    def _half(self, tensor_kind: P2PTensorKind) -> InstructionHalf:
        return InstructionHalf.at(self.run.program.placement, self.run.rank, tensor_kind, self.work)
