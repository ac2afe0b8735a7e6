"""Runs a program on one rank: exactly its instructions, in its order, whatever the schedule.

Knows no model: a stage takes and gives tensors. A stage is a generator that yields where another one may go on: one is
run to its end, or two take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ...comm.async_comm import AsyncWork
from ...comm.errors import CollectiveError
from ...comm.groups import ProcessGroups
from ...comm.p2p import P2PChannel, P2PReceive, P2PSend, build_p2p_channel
from ...comm.streams import DeviceStreams
from ...comm.trace import NULL_RECORDER, PIPELINE_WAIT, SpanRecorder, TimelineTrack
from ..weight_grad import DelayedWeightGradients
from .communication import P2PBatch, P2POp, P2PTensorKind, derive_p2p_batches
from .placement import Direction, StageLocation
from .program import ChunkMicroBatch, Instruction, Op, PipelineProgram, describe_instruction

Result = TypeVar("Result")
Other = TypeVar("Other")
Resumable = Generator[None, bool | None, Result]
"""A yield returns whether another generator takes turns with this one: true while both have steps left."""


def run_to_completion(computation: Resumable[Result]) -> Result:
    """Run a generator to its end, waiting for each communication where it is needed."""
    while True:
        try:
            next(computation)
        except StopIteration as stop:
            result: Result = stop.value
            return result


def interleave(first: Resumable[Result], second: Resumable[Other]) -> tuple[Result, Other]:
    """Run two generators to their ends, one step of each in turn: while one waits for its exchange the other computes.

    With a backward first and a forward second this is the report's order (§3.2.1, figure 4), since each launches an
    exchange at the end of its step and waits for it at the beginning of its next one. While both run each has three
    steps a layer: between the backward's mlp(B) and its next exchange the forward launches the second part of its
    dispatch, which mlp(B) hides. Behind that exchange, which waits for mlp(B), it would hide behind nothing.
    """
    results: list[Any] = [None, None]
    running = {0: first, 1: second}
    begun = False  # a generator takes nothing before its first yield
    while running:
        for turn, steps in list(running.items()):
            try:
                steps.send(len(running) == 2 if begun else None)
            except StopIteration as stop:
                results[turn] = stop.value
                del running[turn]
        begun = True
    return results[0], results[1]


class PipelineStage(Protocol):
    """One chunk of a rank. Micro-batches are numbered over the whole global batch (`PipelineProgram.global_micro_batch_index`)."""

    def forward(self, micro_batch: int, received: Tensor | None) -> Resumable[Tensor | None]:
        """From what the stage before has sent (None in the first) to what the next one needs (None in the last)."""
        ...

    def backward(
        self, micro_batch: int, received: Tensor | None, weights: DelayedWeightGradients
    ) -> Resumable[Tensor | None]:
        """From the gradient of what was sent to that of what was received; weight gradients go to `weights`."""
        ...

    def empty_activation(self, micro_batch: int) -> Tensor:
        """An empty tensor for what travels between stages, forth and back."""
        ...


class InstructionListener(Protocol):
    """Told of each instruction of this rank by its index."""

    def before_instruction(self, instruction: int) -> None:
        """It is about to run."""
        ...

    def after_instruction(self, instruction: int) -> None:
        """It has run, and what it made for other ranks is posted."""
        ...


def build_p2p_channels(
    groups: ProcessGroups,
    device: torch.device,
    recorder: SpanRecorder = NULL_RECORDER,
    streams: DeviceStreams | None = None,
) -> dict[Direction, P2PChannel]:
    """A lane each way where the pipeline has neighbors; on `streams`, by default those of `device`."""
    if groups.topology.pp == 1:
        return {}
    ways = (
        (Direction.NEXT, groups.pp_next, TimelineTrack.P2P_NEXT),
        (Direction.PREV, groups.pp_prev, TimelineTrack.P2P_PREV),
    )
    return {way: build_p2p_channel(group, device, recorder, track, streams) for way, group, track in ways}


_FIRST = "first message between neighbors"


@dataclass(frozen=True)
class PipelineExecutor:
    """A program's share of one pipeline rank, with what it takes to run it."""

    program: PipelineProgram
    pp_rank: int
    """Pipeline rank."""
    channels: Mapping[Direction, P2PChannel]
    """Empty for a pipeline of one rank."""
    global_ranks: tuple[int, ...]
    """Of the pipeline ranks, in order."""
    p2p_batches: tuple[P2PBatch, ...]
    overlap: bool = True
    """Whether the two halves of an FB take turns; else the forward runs first. The numbers are the same."""
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
    ) -> PipelineExecutor:
        """Derives what travels from the program."""
        return PipelineExecutor(
            program, pp_rank, channels, global_ranks, derive_p2p_batches(program)[pp_rank], overlap, recorder
        )

    def run(self, stages: Sequence[PipelineStage], listener: InstructionListener | None = None) -> None:
        """Run every instruction on `stages`, which are indexed by chunk.

        Raises `CollectiveError` for a message that does not come: it names instruction, message and peer.
        """
        run = _Run(self, stages)
        run.post(self.p2p_batches[0])
        for index, instruction in enumerate(self.program.instructions[self.pp_rank]):
            if listener is not None:
                listener.before_instruction(index)
            run.instruction(index, instruction)
            # Before the listener: it may start a collective with ranks that need these messages to get there.
            run.post(self.p2p_batches[index + 1])
            if listener is not None:
                listener.after_instruction(index)
        run.finish()

    def connect_neighbors(self, device: torch.device) -> None:
        """Exchange a first message of one element on `device` with each neighbor; collective over the pipeline.

        NCCL connects two ranks at their first message and blocks the host until both have posted it. A schedule posts
        its receives ahead, so its first one would wait for a message that its sender posts much later, or never.
        All pairs of a direction connect in one batch: two ranks that are both next and previous to each other (a loop
        of two) exchange their connections in one message, whose length must be the same at both ends.
        """
        for direction, lane in self.channels.items():
            sent = {edge.target for commit in self.p2p_batches for edge in commit.sends if edge.direction is direction}
            awaited = {
                edge.source for commit in self.p2p_batches for edge in commit.receives if edge.direction is direction
            }
            lane.post(
                [P2PSend(_FIRST, torch.zeros(1, device=device), peer) for peer in self._peers(sent)],
                [P2PReceive(_FIRST, lambda: torch.zeros(1, device=device), peer) for peer in self._peers(awaited)],
            )
            lane.wait_for_sends()

    def _peers(self, places: Iterable[StageLocation]) -> list[int]:
        """The global ranks of `places`, each once."""
        return [self.global_ranks[rank] for rank in sorted({place.rank for place in places})]


class _Run:
    """The state of one run."""

    def __init__(self, executor: PipelineExecutor, stages: Sequence[PipelineStage]) -> None:
        self._executor = executor
        self._program, self._rank = executor.program, executor.pp_rank
        self._stages = stages
        self._arriving: dict[tuple[P2PTensorKind, ChunkMicroBatch], tuple[P2POp, AsyncWork[Tensor]]] = {}
        self._ready: dict[tuple[P2PTensorKind, ChunkMicroBatch], Tensor] = {}
        """What the work of a chunk here needs, by that work."""
        self._leaving: dict[tuple[P2PTensorKind, ChunkMicroBatch], Tensor] = {}
        """What the work of a chunk here has made for another rank, until it is sent."""
        self._pending_weights: dict[ChunkMicroBatch, DelayedWeightGradients] = {}

    def post(self, commit: P2PBatch) -> None:
        """Send what the last instruction has made, and receive ahead."""
        for direction, lane in self._executor.channels.items():
            receives = [edge for edge in commit.receives if edge.direction is direction]
            arriving = lane.post(
                [self._outgoing(edge) for edge in commit.sends if edge.direction is direction],
                [P2PReceive(edge, self._buffer(edge), self._global(edge.source)) for edge in receives],
            )
            for edge, message in zip(receives, arriving, strict=True):
                self._arriving[edge.tensor_kind, edge.consumer] = (edge, message)

    def instruction(self, index: int, instruction: Instruction) -> None:
        """Compute; the two halves of an FB take turns."""
        forward, backward = instruction.forward, instruction.backward
        try:
            self._await(instruction)
            with self._executor.recorder.span(TimelineTrack.INSTRUCTION, instruction.op, instruction):
                self._compute(instruction.op, forward, backward)
        except CollectiveError as failure:
            raise CollectiveError(f"{describe_instruction(self._rank, index, instruction)}: {failure}") from failure

    def finish(self) -> None:
        """Wait until everything has been sent."""
        for lane in self._executor.channels.values():
            lane.wait_for_sends()

    def _compute(self, op: Op, forward: ChunkMicroBatch | None, backward: ChunkMicroBatch | None) -> None:
        if forward is not None and backward is not None:
            self._pair(forward, backward)
        elif forward is not None:
            self._sent(forward, run_to_completion(self._forward(forward)))
        elif backward is not None and op is Op.W:
            self._pending_weights.pop(backward).flush()
        elif backward is not None:
            self._returned(backward, run_to_completion(self._backward(backward, deferred=op is Op.I)))

    def _await(self, instruction: Instruction) -> None:
        """Wait for the messages that the instruction needs, so that it computes without a break."""
        placement = self._program.placement
        if (work := instruction.forward) is not None:
            self._arrive(
                P2PTensorKind.ACTIVATION, work, placement.previous_location(StageLocation(self._rank, work.chunk))
            )
        if (work := instruction.backward) is not None and instruction.op is not Op.W:
            self._arrive(P2PTensorKind.GRADIENT, work, placement.next_location(StageLocation(self._rank, work.chunk)))

    def _arrive(self, payload: P2PTensorKind, work: ChunkMicroBatch, source: StageLocation | None) -> None:
        """Make ready what another rank has sent for `work`."""
        if source is None or source.rank == self._rank:
            return
        edge, message = self._arriving.pop((payload, work))
        try:
            with self._executor.recorder.span(TimelineTrack.INSTRUCTION, PIPELINE_WAIT, edge):
                self._ready[payload, work] = message.wait()
        except CollectiveError as failure:
            raise CollectiveError(f"waits for the {edge}: {failure}") from failure

    def _pair(self, forward: ChunkMicroBatch, backward: ChunkMicroBatch) -> None:
        if self._executor.overlap:
            grad, output = interleave(self._backward(backward, deferred=False), self._forward(forward))
        else:
            output = run_to_completion(self._forward(forward))
            grad = run_to_completion(self._backward(backward, deferred=False))
        self._sent(forward, output)
        self._returned(backward, grad)

    def _forward(self, work: ChunkMicroBatch) -> Resumable[Tensor | None]:
        source = self._program.placement.previous_location(StageLocation(self._rank, work.chunk))
        received = self._take(P2PTensorKind.ACTIVATION, work, source)
        return self._stages[work.chunk].forward(self._program.global_micro_batch_index(work), received)

    def _backward(self, work: ChunkMicroBatch, *, deferred: bool) -> Resumable[Tensor | None]:
        source = self._program.placement.next_location(StageLocation(self._rank, work.chunk))
        received = self._take(P2PTensorKind.GRADIENT, work, source)
        weights = DelayedWeightGradients(deferred=deferred)
        if deferred:
            self._pending_weights[work] = weights
        return self._stages[work.chunk].backward(self._program.global_micro_batch_index(work), received, weights)

    def _sent(self, work: ChunkMicroBatch, output: Tensor | None) -> None:
        target = self._program.placement.next_location(StageLocation(self._rank, work.chunk))
        self._hand_on(P2PTensorKind.ACTIVATION, work, output, target)

    def _returned(self, work: ChunkMicroBatch, grad: Tensor | None) -> None:
        target = self._program.placement.previous_location(StageLocation(self._rank, work.chunk))
        self._hand_on(P2PTensorKind.GRADIENT, work, grad, target)

    def _take(self, payload: P2PTensorKind, work: ChunkMicroBatch, source: StageLocation | None) -> Tensor | None:
        """What `work` needs, which is here; None where nothing comes before it."""
        return None if source is None else self._ready.pop((payload, work))

    def _hand_on(
        self, payload: P2PTensorKind, work: ChunkMicroBatch, made: Tensor | None, target: StageLocation | None
    ) -> None:
        """To another chunk of this rank, under its name there, or to be sent."""
        if target is None:
            return
        assert made is not None
        if target.rank == self._rank:
            self._ready[payload, ChunkMicroBatch(target.chunk, work.micro_batch)] = made
        else:
            self._leaving[payload, work] = made.contiguous()

    def _outgoing(self, edge: P2POp) -> P2PSend:
        return P2PSend(edge, self._leaving.pop((edge.tensor_kind, edge.producer)), self._global(edge.target))

    def _buffer(self, edge: P2POp) -> Callable[[], Tensor]:
        stage, micro_batch = self._stages[edge.target.chunk], self._program.global_micro_batch_index(edge.consumer)
        return lambda: stage.empty_activation(micro_batch)

    def _global(self, place: StageLocation) -> int:
        return self._executor.global_ranks[place.rank]
