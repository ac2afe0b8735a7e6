"""The memory of one chunk while it runs: what its forward keeps, its backward frees, and both need at their worst.

The counterpart of `trainer/model/chunk.py`: generators that yield where those do, so that the two halves of an FB take
turns here as they do there. They move levels of a `PeakMeter` and no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from ...parallelism.pipeline.executor import Resumable, interleave, run_to_completion
from ...parallelism.pipeline.program import Op
from ..model.config import ModelConfig
from .workspace import PartMemory, StagePartsMemory, WorkspaceBytes


class MemoryKind(StrEnum):
    """What activations, and all that comes and goes within a step, are for."""

    ACTIVATIONS = "activations"  # that a forward keeps for its backward
    DEFERRED = "deferred"  # factors of gradients of weights that are put off
    MESSAGES = "messages"  # between stages, on their way or waiting
    EXCHANGE = "exchange"  # buffers of a token exchange under way
    WORKING = "working"  # what a part of a stage needs while it runs


class PeakMeter:
    """Levels that rise and fall, and what they were when their sum was largest."""

    def __init__(self) -> None:
        self.current: dict[MemoryKind, float] = dict.fromkeys(MemoryKind, 0.0)
        self.at_peak: dict[MemoryKind, float] = dict.fromkeys(MemoryKind, 0.0)
        self.peak_total = 0.0
        """The sum of `peak`."""
        self._sum = 0.0

    def allocate(self, kind: MemoryKind, size: float) -> None:
        """From here on, so much more."""
        self.current[kind] += size
        self._sum += size
        if self._sum > self.peak_total:
            self.peak_total = self._sum
            self.at_peak = dict(self.current)

    def free(self, kind: MemoryKind, size: float) -> None:
        """So much less."""
        self.current[kind] -= size
        self._sum -= size

    def allocate_temporarily(self, size: float, kind: MemoryKind = MemoryKind.WORKING) -> None:
        """For a moment, so much more at work."""
        self.allocate(kind, size)
        self.free(kind, size)

    def run_exchange(self, buffers: float, result: float) -> None:
        """An exchange, whose buffers are gone when its result is there: another part's worst moment is another one."""
        self.allocate_temporarily(buffers, MemoryKind.EXCHANGE)
        self.allocate(MemoryKind.EXCHANGE, result)


@dataclass(frozen=True)
class StageShape:
    """What a stage holds: enough to say how long its chunks take, and what they keep."""

    dense_layers: int
    moe_layers: int
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class ChunkMemorySimulator:
    """The chunk of a stage, run on paper."""

    stage: StageShape
    workspace: WorkspaceBytes

    def simulate(self, op: Op, other: ChunkMemorySimulator | None = None) -> PeakMeter:
        """One instruction, from level 0: with `op` FB this chunk's backward and the `other`'s forward, in turns."""
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
        """Bytes that a forward keeps."""
        return self.simulate(Op.F).current[MemoryKind.ACTIVATIONS]

    @cached_property
    def deferred_bytes(self) -> float:
        """Bytes that are left between I and W."""
        return self.simulate(Op.I).current[MemoryKind.DEFERRED]

    @property
    def message_bytes(self) -> float:
        """Bytes of what stages send each other."""
        return self.workspace.hidden_state_bytes

    def forward(self, meter: PeakMeter) -> Resumable[None]:
        """All layers; in the last stage losses and MTP modules too."""
        meter.allocate(MemoryKind.ACTIVATIONS, self.message_bytes)
        for _ in range(self.stage.dense_layers):
            self._dense_forward(meter)
        for _ in range(self.stage.moe_layers):
            yield from self._moe_forward(meter)
        if not self.stage.is_last:
            meter.free(MemoryKind.ACTIVATIONS, self.message_bytes)  # the output: a message from here on
            return
        for depth in range(self.config.num_nextn_predict_layers + 1):
            if depth:
                meter.allocate(MemoryKind.ACTIVATIONS, self._parts.mtp_merge.saved_bytes + self.message_bytes)
                meter.free(MemoryKind.WORKING, self.message_bytes)  # the hidden state is kept
                yield from self._moe_forward(meter)
            self._loss_forward(meter)
        meter.free(MemoryKind.WORKING, self.message_bytes)

    def backward(self, meter: PeakMeter, *, deferred: bool) -> Resumable[None]:
        """The opposite way, with its own gradients of weights unless they are `deferred`."""
        left, parts = _Left(meter, deferred), self._parts
        meter.allocate(MemoryKind.WORKING, self.message_bytes)  # the gradient that it begins with
        if self.stage.is_last:
            for _ in range(self.config.num_nextn_predict_layers + 1):
                left.finish(parts.loss)
            meter.allocate(
                MemoryKind.WORKING, self.config.num_nextn_predict_layers * self.message_bytes
            )  # gradients of further depths' losses
            for _ in range(self.config.num_nextn_predict_layers):
                left.finish(parts.final_norm)
                yield from self._moe_backward(meter, left)
                left.finish(parts.mtp_merge)
                meter.free(MemoryKind.WORKING, self.message_bytes)
            left.finish(parts.final_norm)
        for _ in range(self.stage.moe_layers):
            yield from self._moe_backward(meter, left)
        for _ in range(self.stage.dense_layers):
            self._dense_backward(meter, left)
        if self.stage.is_first:
            left.finish(parts.embedding)
        left.settle()
        meter.free(MemoryKind.WORKING, self.message_bytes)

    def backward_weights(self, meter: PeakMeter) -> None:
        """What an I has left for its W."""
        parts = self._parts
        here = [parts.embedding] * self.stage.is_first + [parts.dense_layer] * bool(self.stage.dense_layers)
        here += [parts.attention, parts.routed_experts] * bool(
            self.stage.moe_layers or self.config.num_nextn_predict_layers * self.stage.is_last
        )
        meter.allocate_temporarily(max(part.wgrad_bytes for part in here))
        meter.free(MemoryKind.DEFERRED, self.deferred_bytes)

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return self.workspace.config

    @property
    def _parts(self) -> StagePartsMemory:
        return self.workspace.parts_memory

    def _moe_forward(self, meter: PeakMeter) -> Resumable[None]:
        """What the phases give stays until the layer is done, also where no backward wants it."""
        working, parts = self.workspace, self._parts
        begun = meter.current[MemoryKind.WORKING]
        meter.allocate(MemoryKind.ACTIVATIONS, parts.attention.saved_bytes)
        meter.allocate_temporarily(working.attention_forward)
        meter.allocate(MemoryKind.WORKING, 0.0 if working.saves_expert_input else self.message_bytes)
        in_turns = yield  # with the sizes alone under way
        if in_turns:
            meter.run_exchange(working.exchange_buffers.dispatch, working.exchange_buffers.dispatched_row_bytes)
            yield
        if self.config.n_shared_experts:
            meter.allocate(MemoryKind.ACTIVATIONS, parts.shared_experts.saved_bytes)
            meter.allocate(MemoryKind.WORKING, self.message_bytes)  # their result
            meter.allocate_temporarily(working.shared_experts_forward)
        if not in_turns:
            meter.run_exchange(working.exchange_buffers.dispatch, working.exchange_buffers.dispatched_row_bytes)
        meter.free(MemoryKind.EXCHANGE, working.exchange_buffers.dispatched_row_bytes)
        if working.batch.fp8 and not working.exchange_buffers.keeps_rows_in_fp8:
            meter.allocate(
                MemoryKind.WORKING, working.exchange_buffers.expert_row_bytes
            )  # as they came; else that is what is kept
        meter.allocate(MemoryKind.WORKING, working.exchange_buffers.expert_row_bytes)  # results
        meter.allocate(MemoryKind.ACTIVATIONS, parts.routed_experts.saved_bytes)
        meter.allocate_temporarily(working.routed_experts_forward)
        meter.run_exchange(working.exchange_buffers.combine, self.message_bytes)
        yield
        meter.free(MemoryKind.EXCHANGE, self.message_bytes)
        meter.allocate_temporarily(2 * self.message_bytes)  # sums, and with the shared experts'
        meter.allocate(MemoryKind.ACTIVATIONS, self.message_bytes)  # the output: the next layer's input
        meter.free(MemoryKind.WORKING, meter.current[MemoryKind.WORKING] - begun)

    def _dense_forward(self, meter: PeakMeter) -> None:
        meter.allocate(MemoryKind.ACTIVATIONS, self._parts.dense_layer.saved_bytes + self.message_bytes)
        meter.allocate_temporarily(
            max(self.workspace.dense_attention_forward, self.workspace.dense_ffn_forward + self.message_bytes)
        )

    def _loss_forward(self, meter: PeakMeter) -> None:
        """Leaves the hidden state after the norm, which an MTP module goes on from."""
        meter.allocate(MemoryKind.ACTIVATIONS, self._parts.final_norm.saved_bytes - self.message_bytes)
        meter.allocate(MemoryKind.WORKING, self.message_bytes)
        meter.allocate(MemoryKind.ACTIVATIONS, self._parts.loss.saved_bytes)
        meter.allocate_temporarily(self.workspace.loss_logits)

    def _moe_backward(self, meter: PeakMeter, left: _Left) -> Resumable[None]:
        """What exchanges bring stays until the layer is done."""
        working, parts = self.workspace, self._parts
        begun = meter.current[MemoryKind.WORKING]
        meter.run_exchange(working.exchange_buffers.combine_backward, working.exchange_buffers.expert_row_bytes)
        left.settle()
        in_turns = yield
        if self.config.n_shared_experts:
            meter.allocate_temporarily(working.shared_experts_backward)
            left.finish(parts.shared_experts)
            meter.allocate(MemoryKind.WORKING, self.message_bytes)
        meter.free(MemoryKind.EXCHANGE, working.exchange_buffers.expert_row_bytes)
        meter.allocate(MemoryKind.WORKING, working.exchange_buffers.expert_row_bytes)
        meter.allocate_temporarily(working.routed_experts_backward)
        left.finish(parts.routed_experts)
        meter.allocate(MemoryKind.WORKING, working.exchange_buffers.expert_row_bytes)
        if in_turns:
            yield
        meter.run_exchange(working.exchange_buffers.dispatch_backward, self.message_bytes)
        left.settle()
        yield
        meter.free(MemoryKind.EXCHANGE, self.message_bytes)
        meter.allocate(MemoryKind.WORKING, 2 * self.message_bytes)
        meter.allocate_temporarily(working.attention_backward)
        left.finish(parts.attention)
        meter.free(MemoryKind.ACTIVATIONS, self.message_bytes)
        meter.free(MemoryKind.WORKING, meter.current[MemoryKind.WORKING] - begun)

    def _dense_backward(self, meter: PeakMeter, left: _Left) -> None:
        meter.allocate_temporarily(max(self.workspace.dense_ffn_backward, self.workspace.dense_attention_backward))
        left.finish(self._parts.dense_layer)
        meter.free(MemoryKind.ACTIVATIONS, self.message_bytes)


class _Left:
    """Work for weights that a backward leaves for its next moment, or for W."""

    def __init__(self, meter: PeakMeter, deferred: bool) -> None:
        self._meter, self._deferred = meter, deferred
        self._held = self._product = 0.0

    def finish(self, part: PartMemory) -> None:
        """A part's backward of inputs is done: what it kept goes, but for what gradients of weights take."""
        self._meter.free(MemoryKind.ACTIVATIONS, part.saved_bytes)
        self._meter.allocate(MemoryKind.DEFERRED, part.deferred_bytes)
        self._held += part.deferred_bytes
        self._product = max(self._product, part.wgrad_bytes)

    def settle(self) -> None:
        """Form them, unless all are put off."""
        if self._deferred:
            return
        self._meter.allocate_temporarily(self._product)
        self._meter.free(MemoryKind.DEFERRED, self._held)
        self._held = self._product = 0.0
