"""Simulated memory of one chunk: bytes that its forward saves, its backward frees, and both need at their peak.

The generators yield where those of `trainer/model/chunk.py` do, so that the forward and backward of an FB interleave as
at run time. They change the levels of a `PeakMeter` and compute no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from ...parallelism.pipeline.instruction import Resumable, interleave, run_to_completion
from ...parallelism.pipeline.program import Op
from ..model.config import ModelConfig
from .workspace import PartMemory, StagePartsMemory, WorkspaceBytes


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
class StageShape:
    """Numbers of layers of a stage, and the position of the stage; they determine its time and memory."""

    dense_layers: int
    moe_layers: int
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class ChunkMemorySimulator:
    """Simulator of the memory of a stage's chunk."""

    stage: StageShape
    workspace: WorkspaceBytes

    def simulate(self, op: Op, other: ChunkMemorySimulator | None = None) -> PeakMeter:
        """Simulate one instruction from level 0; FB interleaves this chunk's backward and the forward of `other`."""
        meter = PeakMeter()
        if op is Op.F:
            run_to_completion(self.forward(meter))
        elif op is Op.W:
            self.backward_weights(meter)
        elif op is Op.FB:
            assert other is not None
            interleave(self.backward(meter, deferred=False), other.forward(meter))
        else:
            run_to_completion(self.backward(meter, deferred=op is Op.I))
        return meter

    @cached_property
    def saved_bytes(self) -> float:
        """Bytes that a forward saves for its backward."""
        return self.simulate(Op.F).current[MemoryKind.ACTIVATIONS]

    @cached_property
    def deferred_bytes(self) -> float:
        """Bytes that are held between I and W."""
        return self.simulate(Op.I).current[MemoryKind.DELAYED_WGRAD]

    @property
    def message_bytes(self) -> float:
        """Bytes of one message between stages."""
        return self.workspace.hidden_state_bytes

    def forward(self, meter: PeakMeter) -> Resumable[None]:
        """Simulate the forward of all layers, and on the last stage of losses and MTP modules."""
        meter.allocate(MemoryKind.ACTIVATIONS, self.message_bytes)
        for _ in range(self.stage.dense_layers):
            self._dense_forward(meter)
        for _ in range(self.stage.moe_layers):
            yield from self._moe_forward(meter)
        if not self.stage.is_last:
            # The output is counted among the messages from here on.
            meter.free(MemoryKind.ACTIVATIONS, self.message_bytes)
            return
        for depth in range(self.config.num_nextn_predict_layers + 1):
            if depth:
                meter.allocate(MemoryKind.ACTIVATIONS, self._parts.mtp_merge.saved_bytes + self.message_bytes)
                meter.free(MemoryKind.WORKSPACE, self.message_bytes)  # the hidden state is kept
                yield from self._moe_forward(meter)
            self._loss_forward(meter)
        meter.free(MemoryKind.WORKSPACE, self.message_bytes)

    def backward(self, meter: PeakMeter, *, deferred: bool) -> Resumable[None]:
        """Simulate the backward of all layers, including weight gradients unless they are `deferred` to W."""
        left, parts = _Left(meter, deferred), self._parts
        meter.allocate(MemoryKind.WORKSPACE, self.message_bytes)  # the gradient that it begins with
        if self.stage.is_last:
            for _ in range(self.config.num_nextn_predict_layers + 1):
                left.finish(parts.loss)
            # The backward of every loss runs first, so the input gradients of all MTP losses wait here.
            meter.allocate(MemoryKind.WORKSPACE, self.config.num_nextn_predict_layers * self.message_bytes)
            for _ in range(self.config.num_nextn_predict_layers):
                left.finish(parts.final_norm)
                yield from self._moe_backward(meter, left)
                left.finish(parts.mtp_merge)
                meter.free(MemoryKind.WORKSPACE, self.message_bytes)
            left.finish(parts.final_norm)
        for _ in range(self.stage.moe_layers):
            yield from self._moe_backward(meter, left)
        for _ in range(self.stage.dense_layers):
            self._dense_backward(meter, left)
        if self.stage.is_first:
            left.finish(parts.embedding)
        left.flush()
        meter.free(MemoryKind.WORKSPACE, self.message_bytes)

    def backward_weights(self, meter: PeakMeter) -> None:
        """Simulate W, the weight gradients that an I deferred."""
        # They are computed one at a time, so only the largest product counts; the saved inputs are freed at the end.
        parts = self._parts
        here = [parts.embedding] * self.stage.is_first + [parts.dense_layer] * bool(self.stage.dense_layers)
        here += [parts.attention, parts.routed_experts] * bool(
            self.stage.moe_layers or self.config.num_nextn_predict_layers * self.stage.is_last
        )
        meter.allocate_temporarily(max(part.wgrad_bytes for part in here))
        meter.free(MemoryKind.DELAYED_WGRAD, self.deferred_bytes)

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self.workspace.config

    @property
    def _parts(self) -> StagePartsMemory:
        return self.workspace.parts_memory

    def _moe_forward(self, meter: PeakMeter) -> Resumable[None]:
        """Simulate the forward of an MoE layer; see `Chunk._moe`."""
        # The generator's local variables hold the results of all phases until the layer is done, also those that no
        # backward needs.
        working, parts = self.workspace, self._parts
        begun = meter.current[MemoryKind.WORKSPACE]
        meter.allocate(MemoryKind.ACTIVATIONS, parts.attention.saved_bytes)
        meter.allocate_temporarily(working.attention_forward)
        meter.allocate(MemoryKind.WORKSPACE, 0.0 if working.saves_expert_input else self.message_bytes)
        is_interleaved = yield  # only the sizes are in flight
        if is_interleaved:
            meter.run_exchange(working.exchange_buffers.dispatch, working.exchange_buffers.dispatched_row_bytes)
            yield
        if self.config.n_shared_experts:
            meter.allocate(MemoryKind.ACTIVATIONS, parts.shared_experts.saved_bytes)
            meter.allocate(MemoryKind.WORKSPACE, self.message_bytes)  # their result
            meter.allocate_temporarily(working.shared_experts_forward)
        if not is_interleaved:
            meter.run_exchange(working.exchange_buffers.dispatch, working.exchange_buffers.dispatched_row_bytes)
        meter.free(MemoryKind.EXCHANGE_BUFFERS, working.exchange_buffers.dispatched_row_bytes)
        if working.batch.fp8 and not working.exchange_buffers.keeps_rows_in_fp8:
            # Rows dispatched in a wide format stay allocated next to the FP8 copy that is saved of them.
            meter.allocate(MemoryKind.WORKSPACE, working.exchange_buffers.expert_row_bytes)
        meter.allocate(MemoryKind.WORKSPACE, working.exchange_buffers.expert_row_bytes)  # results
        meter.allocate(MemoryKind.ACTIVATIONS, parts.routed_experts.saved_bytes)
        meter.allocate_temporarily(working.routed_experts_forward)
        meter.run_exchange(working.exchange_buffers.combine, self.message_bytes)
        yield
        meter.free(MemoryKind.EXCHANGE_BUFFERS, self.message_bytes)
        meter.allocate_temporarily(2 * self.message_bytes)  # sums, and with the shared experts'
        meter.allocate(MemoryKind.ACTIVATIONS, self.message_bytes)  # the output: the next layer's input
        meter.free(MemoryKind.WORKSPACE, meter.current[MemoryKind.WORKSPACE] - begun)

    def _dense_forward(self, meter: PeakMeter) -> None:
        meter.allocate(MemoryKind.ACTIVATIONS, self._parts.dense_layer.saved_bytes + self.message_bytes)
        meter.allocate_temporarily(
            max(self.workspace.dense_attention_forward, self.workspace.dense_ffn_forward + self.message_bytes)
        )

    def _loss_forward(self, meter: PeakMeter) -> None:
        """Simulate final norm and loss; the normed hidden state stays, as input of the next MTP module."""
        meter.allocate(MemoryKind.ACTIVATIONS, self._parts.final_norm.saved_bytes - self.message_bytes)
        meter.allocate(MemoryKind.WORKSPACE, self.message_bytes)
        meter.allocate(MemoryKind.ACTIVATIONS, self._parts.loss.saved_bytes)
        meter.allocate_temporarily(self.workspace.loss_logits)

    def _moe_backward(self, meter: PeakMeter, left: _Left) -> Resumable[None]:
        """Simulate the backward of an MoE layer; see `Chunk._moe`."""
        # As in the forward, results of exchanges stay until the layer is done.
        working, parts = self.workspace, self._parts
        begun = meter.current[MemoryKind.WORKSPACE]
        meter.run_exchange(working.exchange_buffers.combine_backward, working.exchange_buffers.expert_row_bytes)
        left.flush()
        is_interleaved = yield
        if self.config.n_shared_experts:
            meter.allocate_temporarily(working.shared_experts_backward)
            left.finish(parts.shared_experts)
            meter.allocate(MemoryKind.WORKSPACE, self.message_bytes)
        meter.free(MemoryKind.EXCHANGE_BUFFERS, working.exchange_buffers.expert_row_bytes)
        meter.allocate(MemoryKind.WORKSPACE, working.exchange_buffers.expert_row_bytes)
        meter.allocate_temporarily(working.routed_experts_backward)
        left.finish(parts.routed_experts)
        meter.allocate(MemoryKind.WORKSPACE, working.exchange_buffers.expert_row_bytes)
        if is_interleaved:
            yield
        meter.run_exchange(working.exchange_buffers.dispatch_backward, self.message_bytes)
        left.flush()
        yield
        meter.free(MemoryKind.EXCHANGE_BUFFERS, self.message_bytes)
        meter.allocate(MemoryKind.WORKSPACE, 2 * self.message_bytes)
        meter.allocate_temporarily(working.attention_backward)
        left.finish(parts.attention)
        meter.free(MemoryKind.ACTIVATIONS, self.message_bytes)
        meter.free(MemoryKind.WORKSPACE, meter.current[MemoryKind.WORKSPACE] - begun)

    def _dense_backward(self, meter: PeakMeter, left: _Left) -> None:
        meter.allocate_temporarily(max(self.workspace.dense_ffn_backward, self.workspace.dense_attention_backward))
        left.finish(self._parts.dense_layer)
        meter.free(MemoryKind.ACTIVATIONS, self.message_bytes)


class _Left:
    """Delayed weight gradients of a backward, until its next flush or until W."""

    def __init__(self, meter: PeakMeter, deferred: bool) -> None:
        self._meter, self._deferred = meter, deferred
        self._held = self._product = 0.0

    def finish(self, part: PartMemory) -> None:
        """Finish a part's backward of inputs: free its saved activations but for the inputs of weight gradients."""
        self._meter.free(MemoryKind.ACTIVATIONS, part.saved_bytes)
        self._meter.allocate(MemoryKind.DELAYED_WGRAD, part.deferred_bytes)
        self._held += part.deferred_bytes
        self._product = max(self._product, part.wgrad_bytes)

    def flush(self) -> None:
        """Compute the delayed weight gradients, unless they are deferred to W."""
        if self._deferred:
            return
        self._meter.allocate_temporarily(self._product)
        self._meter.free(MemoryKind.DELAYED_WGRAD, self._held)
        self._held = self._product = 0.0
