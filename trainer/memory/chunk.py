"""Simulated memory of one chunk: bytes that its forward saves, its backward frees, and both need at their peak.

The chunks follow the runtime's order of steps (`parallelism/pipeline/chunk_walk.py`), so that the forward and backward
of an FB interleave as at run time. They change the levels of a `PeakMeter` and compute no tensor.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from typing_extensions import override

from ...parallelism.pipeline.chunk_walk import (
    ChunkInterpreter,
    ExchangeOperation,
    LayerPart,
    MoELayerInterpreter,
    StageShape,
    walk_backward,
    walk_forward,
)
from ...parallelism.pipeline.instruction import Resumable, run_instruction, run_to_completion
from ...parallelism.pipeline.program import Op
from .workspace import WorkspaceBytes


class MemoryKind(StrEnum):
    """Kind of memory that is allocated and freed within a step; `memory` and `simulate` print these names."""

    ACTIVATIONS = "activations"  # saved by a forward for its backward
    DELAYED_WGRAD = "delayed_wgrad"  # inputs of delayed weight gradients
    P2P_MESSAGES = "p2p_messages"  # P2P messages between stages, in flight or waiting
    EXCHANGE_BUFFERS = "exchange_buffers"  # buffers of a token exchange in flight
    WORKSPACE = "workspace"  # workspace of the part that runs


class PeakMeter:
    """Allocated bytes by kind, now and when their sum was largest."""

    def __init__(self) -> None:
        self.current: dict[MemoryKind, float] = dict.fromkeys(MemoryKind, 0.0)
        self.at_peak: dict[MemoryKind, float] = dict.fromkeys(MemoryKind, 0.0)
        self.peak_total = 0.0
        """Sum of `at_peak`."""
        self._sum = 0.0

    def allocate(self, kind: MemoryKind, size: float) -> None:
        """Allocate `size` bytes."""
        self.current[kind] += size
        self._sum += size
        if self._sum > self.peak_total:
            self.peak_total = self._sum
            self.at_peak = dict(self.current)

    def free(self, kind: MemoryKind, size: float) -> None:
        """Free `size` bytes."""
        self.current[kind] -= size
        self._sum -= size

    def allocate_temporarily(self, size: float, kind: MemoryKind = MemoryKind.WORKSPACE) -> None:
        """Allocate `size` bytes and free them again."""
        self.allocate(kind, size)
        self.free(kind, size)

    def run_exchange(self, buffers: float, result: float) -> None:
        """Allocate the buffers of an exchange, free them, and allocate its result."""
        # The buffers are gone once the result exists, so they do not add to the peak of a later part.
        self.allocate_temporarily(buffers, MemoryKind.EXCHANGE_BUFFERS)
        self.allocate(MemoryKind.EXCHANGE_BUFFERS, result)


@dataclass(frozen=True)
class ChunkMemorySimulator:
    """Simulator of the memory of a stage's chunk."""

    stage: StageShape
    workspace: WorkspaceBytes

    @cached_property
    def saved_bytes(self) -> float:
        """Bytes that a forward saves for its backward."""
        return simulate_instruction(Op.F, self, None).current[MemoryKind.ACTIVATIONS]

    @cached_property
    def deferred_bytes(self) -> float:
        """Bytes that are held between I and W."""
        return simulate_instruction(Op.I, None, self).current[MemoryKind.DELAYED_WGRAD]

    @property
    def mtp_modules(self) -> int:
        """MTP modules of the model, which the last stage runs."""
        return self.workspace.config.num_nextn_predict_layers


def simulate_instruction(
    op: Op, forward: ChunkMemorySimulator | None, backward: ChunkMemorySimulator | None
) -> PeakMeter:
    """Simulate one instruction from level 0, an FB interleaved."""
    meter = PeakMeter()
    ahead, back = (None if chunk is None else MeteredChunk(chunk, meter) for chunk in (forward, backward))
    run_instruction(op, ahead, back)
    return meter


@dataclass(frozen=True)
class MeteredChunk:
    """Chunk whose forward and backward change the levels of `meter`."""

    chunk: ChunkMemorySimulator
    meter: PeakMeter

    def forward(self) -> Resumable[None]:
        """Simulate the forward of all layers, and on the last stage of losses and MTP modules."""
        chunk, meter = self.chunk, self.meter
        meter.allocate(MemoryKind.ACTIVATIONS, chunk.workspace.hidden_state_bytes)
        yield from walk_forward(chunk.stage, chunk.mtp_modules, _ForwardBytes(chunk, meter))
        # Counted among the messages from here on; on the last stage the normed hidden state, which no part needs.
        kind = MemoryKind.WORKSPACE if chunk.stage.is_last else MemoryKind.ACTIVATIONS
        meter.free(kind, chunk.workspace.hidden_state_bytes)

    def backward(self, *, deferred: bool) -> Resumable[None]:
        """Simulate the backward of all layers, including weight gradients unless they are `deferred` to W."""
        chunk, meter = self.chunk, self.meter
        meter.allocate(MemoryKind.WORKSPACE, chunk.workspace.hidden_state_bytes)  # the gradient that it begins with
        yield from walk_backward(chunk.stage, chunk.mtp_modules, _BackwardBytes(chunk, meter, deferred))
        meter.free(MemoryKind.WORKSPACE, chunk.workspace.hidden_state_bytes)

    def weight_gradients(self) -> None:
        """Simulate W, the weight gradients that an I deferred."""
        chunk = self.chunk
        left = _BackwardBytes(chunk, PeakMeter(), deferred=True)
        run_to_completion(walk_backward(chunk.stage, chunk.mtp_modules, left))
        # They are computed one at a time, so only the largest product counts; the saved inputs are freed at the end.
        self.meter.allocate_temporarily(left.product)
        self.meter.free(MemoryKind.DELAYED_WGRAD, left.held)


class _ForwardBytes(ChunkInterpreter):
    """Forward of a chunk."""

    def __init__(self, chunk: ChunkMemorySimulator, meter: PeakMeter) -> None:
        self._working, self._meter = chunk.workspace, meter

    @override
    def compute(self, part: LayerPart, index: int) -> None:
        meter, memory, message = self._meter, self._working.parts[part], self._working.hidden_state_bytes
        match part:
            case LayerPart.DENSE_LAYER:
                meter.allocate(MemoryKind.ACTIVATIONS, memory.saved_bytes + message)
            case LayerPart.FINAL_NORM:
                # The normed hidden state stays, as input of the next MTP module.
                meter.allocate(MemoryKind.ACTIVATIONS, memory.saved_bytes - message)
                meter.allocate(MemoryKind.WORKSPACE, message)
            case LayerPart.LOSS:
                meter.allocate(MemoryKind.ACTIVATIONS, memory.saved_bytes)
            case LayerPart.MTP_MERGE:
                meter.allocate(MemoryKind.ACTIVATIONS, memory.saved_bytes + message)
                meter.free(MemoryKind.WORKSPACE, message)  # the hidden state is kept
        meter.allocate_temporarily(memory.forward_bytes)

    @override
    def moe_layer(self, place: int) -> MoELayerInterpreter:
        return _MoEForwardBytes(self._working, self._meter)


class _MoEForwardBytes(MoELayerInterpreter):
    """Forward of an MoE layer; see `MoEForward` of `trainer/model/moe_phases.py`."""

    # As there, the results of all phases stay until the layer is done, also those that no backward needs.

    def __init__(self, working: WorkspaceBytes, meter: PeakMeter) -> None:
        self._working, self._meter = working, meter
        self._begun = meter.current[MemoryKind.WORKSPACE]
        self._rows_sent = False

    @override
    def compute(self, part: LayerPart) -> None:
        working, meter, memory = self._working, self._meter, self._working.parts[part]
        if part is LayerPart.SHARED_EXPERTS and not working.config.n_shared_experts:
            return
        if part is LayerPart.ROUTED_EXPERTS:
            meter.allocate(MemoryKind.WORKSPACE, working.exchange_buffers.expert_row_bytes)  # results
        if part is LayerPart.SHARED_EXPERTS:
            meter.allocate(MemoryKind.WORKSPACE, working.hidden_state_bytes)  # their result
        meter.allocate(MemoryKind.ACTIVATIONS, memory.saved_bytes)
        meter.allocate_temporarily(memory.forward_bytes)
        if part is LayerPart.ATTENTION and not working.saves_expert_input:
            meter.allocate(MemoryKind.WORKSPACE, working.hidden_state_bytes)
        if part is LayerPart.MERGE:
            meter.free(MemoryKind.WORKSPACE, meter.current[MemoryKind.WORKSPACE] - self._begun)

    @override
    def launch(self, exchange: ExchangeOperation) -> None:
        # Of a dispatch only the sizes are in flight until its second part is launched.
        if exchange is ExchangeOperation.COMBINE:
            self._meter.run_exchange(self._working.exchange_buffers.combine, self._working.hidden_state_bytes)

    @override
    def launch_second_part(self) -> None:
        buffers = self._working.exchange_buffers
        self._meter.run_exchange(buffers.dispatch, buffers.dispatched_row_bytes)
        self._rows_sent = True

    @override
    def wait(self, exchange: ExchangeOperation) -> None:
        meter, buffers = self._meter, self._working.exchange_buffers
        if exchange is ExchangeOperation.COMBINE:
            meter.free(MemoryKind.EXCHANGE_BUFFERS, self._working.hidden_state_bytes)
            return
        if not self._rows_sent:
            self.launch_second_part()
        meter.free(MemoryKind.EXCHANGE_BUFFERS, buffers.dispatched_row_bytes)
        if self._working.batch.fp8 and not buffers.keeps_rows_in_fp8:
            # Rows dispatched in a wide format stay allocated next to the FP8 copy that is saved of them.
            meter.allocate(MemoryKind.WORKSPACE, buffers.expert_row_bytes)


class _BackwardBytes(ChunkInterpreter):
    """Backward of a chunk, with the weight gradients that it delays until its next flush or until W."""

    def __init__(self, chunk: ChunkMemorySimulator, meter: PeakMeter, deferred: bool) -> None:
        self.working, self.meter, self._deferred = chunk.workspace, meter, deferred
        self._mtp_modules = chunk.mtp_modules
        self.held = 0.0
        """Bytes of the inputs of delayed weight gradients."""
        self.product = 0.0
        """Bytes of the largest of these gradients."""

    @override
    def compute(self, part: LayerPart, index: int) -> None:
        meter, message = self.meter, self.working.hidden_state_bytes
        self.finish(part)
        match part:
            case LayerPart.LOSS if index < self._mtp_modules:
                # The backward of every loss runs first, so the input gradients of all but the deepest wait here.
                meter.allocate(MemoryKind.WORKSPACE, message)
            case LayerPart.MTP_MERGE:
                meter.free(MemoryKind.WORKSPACE, message)
            case LayerPart.DENSE_LAYER:
                meter.free(MemoryKind.ACTIVATIONS, message)

    @override
    def moe_layer(self, place: int) -> MoELayerInterpreter:
        return _MoEBackwardBytes(self)

    @override
    def flush_weight_gradients(self, part: LayerPart) -> None:
        if not self._deferred:
            self.meter.allocate_temporarily(self.product)
            self.meter.free(MemoryKind.DELAYED_WGRAD, self.held)
            self.held = self.product = 0.0

    def finish(self, part: LayerPart) -> None:
        """Run a part's backward of inputs: free its saved activations but for the inputs of weight gradients."""
        memory = self.working.parts[part]
        self.meter.allocate_temporarily(memory.backward_bytes)
        self.meter.free(MemoryKind.ACTIVATIONS, memory.saved_bytes)
        self.meter.allocate(MemoryKind.DELAYED_WGRAD, memory.deferred_bytes)
        self.held += memory.deferred_bytes
        self.product = max(self.product, memory.wgrad_bytes)


class _MoEBackwardBytes(MoELayerInterpreter):
    """Backward of an MoE layer; as in its forward, the results of exchanges stay until the layer is done."""

    def __init__(self, chunk: _BackwardBytes) -> None:
        self._chunk, self._working, self._meter = chunk, chunk.working, chunk.meter
        self._begun = self._meter.current[MemoryKind.WORKSPACE]

    @override
    def compute(self, part: LayerPart) -> None:
        working, meter, message = self._working, self._meter, self._working.hidden_state_bytes
        match part:
            case LayerPart.SHARED_EXPERTS if working.config.n_shared_experts:
                self._chunk.finish(part)
                meter.allocate(MemoryKind.WORKSPACE, message)
            case LayerPart.ROUTED_EXPERTS:
                self._chunk.finish(part)
                meter.allocate(MemoryKind.WORKSPACE, working.exchange_buffers.expert_row_bytes)
            case LayerPart.ATTENTION:
                meter.allocate(MemoryKind.WORKSPACE, 2 * message)
                self._chunk.finish(part)
                meter.free(MemoryKind.ACTIVATIONS, message)
                meter.free(MemoryKind.WORKSPACE, meter.current[MemoryKind.WORKSPACE] - self._begun)

    @override
    def launch(self, exchange: ExchangeOperation) -> None:
        buffers = self._working.exchange_buffers
        if exchange is ExchangeOperation.COMBINE_BACKWARD:
            self._meter.run_exchange(buffers.combine_backward, buffers.expert_row_bytes)
        else:
            self._meter.run_exchange(buffers.dispatch_backward, self._working.hidden_state_bytes)

    @override
    def wait(self, exchange: ExchangeOperation) -> None:
        rows = self._working.exchange_buffers.expert_row_bytes
        if exchange is ExchangeOperation.COMBINE_BACKWARD:
            self._meter.free(MemoryKind.EXCHANGE_BUFFERS, rows)
            self._meter.allocate(MemoryKind.WORKSPACE, rows)
        else:
            self._meter.free(MemoryKind.EXCHANGE_BUFFERS, self._working.hidden_state_bytes)

    @override
    def flush_weight_gradients(self, part: LayerPart) -> None:
        self._chunk.flush_weight_gradients(part)
