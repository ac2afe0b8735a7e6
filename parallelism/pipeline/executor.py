"""Execution of a program on one rank: exactly its instructions, in order, for every schedule.

Independent of the model: stages receive and return tensors. Their forward and backward are resumable computations,
which run to completion alone or interleaved in pairs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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
from .communication import P2PBatch, P2POp, P2PTensorKind, derive_p2p_batches
from .instruction import Resumable, run_instruction
from .placement import Direction, StageLocation
from .program import ChunkMicroBatch, Instruction, Op, PipelineProgram, describe_instruction


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
    p2p_batches: tuple[P2PBatch, ...]
    overlap: bool = True
    """Interleave the two halves of an FB; if False, run the forward first. The results are equal."""
    recorder: SpanRecorder = NULL_RECORDER

    @staticmethod
    def from_program(
        program: PipelineProgram,
        pp_rank: int,
        channels: Mapping[Direction, P2PChannel],
        global_ranks: tuple[int, ...],
        *,
        overlap: bool = True,
        recorder: SpanRecorder = NULL_RECORDER,
    ) -> "PipelineExecutor":
        """Create an executor, deriving the messages from the program."""
        return PipelineExecutor(
            program, pp_rank, channels, global_ranks, derive_p2p_batches(program)[pp_rank], overlap, recorder
        )

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
            sent = {
                p2p_op.target
                for p2p_batch in self.p2p_batches
                for p2p_op in p2p_batch.sends
                if p2p_op.direction is direction
            }
            awaited = {
                p2p_op.source
                for p2p_batch in self.p2p_batches
                for p2p_op in p2p_batch.receives
                if p2p_op.direction is direction
            }
            channel.post(
                [P2PSend(_WARM_UP_MESSAGE, torch.zeros(1, device=device), peer) for peer in self._peers(sent)],
                [
                    P2PReceive(_WARM_UP_MESSAGE, lambda: torch.zeros(1, device=device), peer)
                    for peer in self._peers(awaited)
                ],
            )
            channel.wait_for_sends()

    def _peers(self, places: Iterable[StageLocation]) -> list[int]:
        """Return the global ranks of `places` in ascending order, without repetition."""
        return [self.global_ranks[rank] for rank in sorted({place.rank for place in places})]


class _Run:
    """State of one run of a program."""

    def __init__(self, executor: PipelineExecutor, stages: Sequence[PipelineStage]) -> None:
        self._executor = executor
        self._program, self._rank = executor.program, executor.pp_rank
        self._stages = stages
        self._arriving: dict[tuple[P2PTensorKind, ChunkMicroBatch], tuple[P2POp, AsyncWork[Tensor]]] = {}
        self._ready: dict[tuple[P2PTensorKind, ChunkMicroBatch], Tensor] = {}
        """Inputs that have arrived, by the chunk and micro-batch that need them."""
        self._leaving: dict[tuple[P2PTensorKind, ChunkMicroBatch], Tensor] = {}
        """Results for other ranks that are not sent yet, by the chunk and micro-batch that produced them."""
        self._pending_weights: dict[ChunkMicroBatch, DelayedWeightGradients] = {}

    def post(self, p2p_batch: P2PBatch) -> None:
        """Post the sends and receives of a batch."""
        for direction, channel in self._executor.channels.items():
            receives = [p2p_op for p2p_op in p2p_batch.receives if p2p_op.direction is direction]
            arriving = channel.post(
                [self._outgoing(p2p_op) for p2p_op in p2p_batch.sends if p2p_op.direction is direction],
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
            self._wait_for_inputs(instruction)
            with recorder.span(TimelineTrack.INSTRUCTION, instruction.op, instruction):
                run_instruction(instruction.op, forward, backward, overlap=overlap)
        except CollectiveError as failure:
            raise CollectiveError(f"{describe_instruction(self._rank, index, instruction)}: {failure}") from failure

    def finish(self) -> None:
        """Wait until every send has finished."""
        for channel in self._executor.channels.values():
            channel.wait_for_sends()

    def _wait_for_inputs(self, instruction: Instruction) -> None:
        """Wait for the messages that the instruction needs."""
        # All of them before it starts: its span then holds no pipeline wait, which has a separate span.
        placement = self._program.placement
        if (work := instruction.forward) is not None:
            self._wait_for_message(
                P2PTensorKind.ACTIVATION, work, placement.previous_location(StageLocation(self._rank, work.chunk))
            )
        if (work := instruction.backward) is not None and instruction.op is not Op.W:
            self._wait_for_message(
                P2PTensorKind.GRADIENT, work, placement.next_location(StageLocation(self._rank, work.chunk))
            )

    def _wait_for_message(self, payload: P2PTensorKind, work: ChunkMicroBatch, source: StageLocation | None) -> None:
        """Wait for the tensor that another rank sends for `work`."""
        if source is None or source.rank == self._rank:
            return
        p2p_op, message = self._arriving.pop((payload, work))
        try:
            with self._executor.recorder.span(TimelineTrack.INSTRUCTION, PIPELINE_WAIT, p2p_op):
                self._ready[payload, work] = message.wait()
        except CollectiveError as failure:
            raise CollectiveError(f"waiting for the {p2p_op}: {failure}") from failure

    def forward(self, work: ChunkMicroBatch) -> Resumable[None]:
        """Run the forward of a micro-batch and keep its output for the next stage."""
        here, placement = StageLocation(self._rank, work.chunk), self._program.placement
        # No variable here may hold the input: it is freed when the stage has used it.
        output = yield from self._stages[work.chunk].forward(
            self._program.global_micro_batch_index(work),
            self._take_input(P2PTensorKind.ACTIVATION, work, placement.previous_location(here)),
        )
        self._deliver(P2PTensorKind.ACTIVATION, work, output, placement.next_location(here))

    def backward(self, work: ChunkMicroBatch, *, deferred: bool) -> Resumable[None]:
        """Run the backward of a micro-batch and keep the gradient of its input for the previous stage."""
        here, placement = StageLocation(self._rank, work.chunk), self._program.placement
        weights = DelayedWeightGradients(deferred=deferred)
        if deferred:
            self._pending_weights[work] = weights
        grad = yield from self._stages[work.chunk].backward(
            self._program.global_micro_batch_index(work),
            self._take_input(P2PTensorKind.GRADIENT, work, placement.next_location(here)),
            weights,
        )
        self._deliver(P2PTensorKind.GRADIENT, work, grad, placement.previous_location(here))

    def weight_gradients(self, work: ChunkMicroBatch) -> None:
        """Compute the weight gradients that an I left."""
        self._pending_weights.pop(work).flush()

    def _take_input(self, payload: P2PTensorKind, work: ChunkMicroBatch, source: StageLocation | None) -> Tensor | None:
        """Return the input of `work`, which has arrived; None in the first stage of its direction."""
        return None if source is None else self._ready.pop((payload, work))

    def _deliver(
        self, payload: P2PTensorKind, work: ChunkMicroBatch, made: Tensor | None, target: StageLocation | None
    ) -> None:
        """Pass a result to another chunk of this rank, or keep it to be sent."""
        if target is None:
            return
        assert made is not None
        if target.rank == self._rank:
            self._ready[payload, ChunkMicroBatch(target.chunk, work.micro_batch)] = made
        else:
            self._leaving[payload, work] = made.contiguous()

    def _outgoing(self, p2p_op: P2POp) -> P2PSend:
        return P2PSend(p2p_op, self._leaving.pop((p2p_op.tensor_kind, p2p_op.producer)), self._global(p2p_op.target))

    def _buffer(self, p2p_op: P2POp) -> Callable[[], Tensor]:
        stage, micro_batch = self._stages[p2p_op.target.chunk], self._program.global_micro_batch_index(p2p_op.consumer)
        return lambda: stage.empty_activation(micro_batch)

    def _global(self, place: StageLocation) -> int:
        return self._executor.global_ranks[place.rank]


@dataclass(frozen=True)
class _ChunkRun:
    """One micro-batch in one chunk of a run, as `run_instruction` needs it."""

    run: _Run
    work: ChunkMicroBatch

    def forward(self) -> Resumable[None]:
        return self.run.forward(self.work)

    def backward(self, *, deferred: bool) -> Resumable[None]:
        return self.run.backward(self.work, deferred=deferred)

    def weight_gradients(self) -> None:
        self.run.weight_gradients(self.work)
