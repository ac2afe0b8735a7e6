"""The memory of one chunk while it runs: what its forward keeps, its backward frees, and both need at their worst.

The counterpart of `trainer/model/chunk.py`: generators that yield where those do, so that the two halves of an FB take
turns here as they do there. They move levels of a `PeakMeter` and no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from ...parallelism.pipeline.executor import Steps, drive, take_turns
from ...parallelism.pipeline.program import Op
from ..model.config import ModelConfig
from .working import Parts, PartSize, Working


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
        self.levels: dict[MemoryKind, float] = dict.fromkeys(MemoryKind, 0.0)
        self.peak: dict[MemoryKind, float] = dict.fromkeys(MemoryKind, 0.0)
        self.largest = 0.0
        """The sum of `peak`."""
        self._sum = 0.0

    def hold(self, kind: MemoryKind, size: float) -> None:
        """From here on, so much more."""
        self.levels[kind] += size
        self._sum += size
        if self._sum > self.largest:
            self.largest = self._sum
            self.peak = dict(self.levels)

    def drop(self, kind: MemoryKind, size: float) -> None:
        """So much less."""
        self.levels[kind] -= size
        self._sum -= size

    def work(self, size: float, kind: MemoryKind = MemoryKind.WORKING) -> None:
        """For a moment, so much more at work."""
        self.hold(kind, size)
        self.drop(kind, size)

    def launch(self, buffers: float, result: float) -> None:
        """An exchange, whose buffers are gone when its result is there: another part's worst moment is another one."""
        self.work(buffers, MemoryKind.EXCHANGE)
        self.hold(MemoryKind.EXCHANGE, result)


@dataclass(frozen=True)
class StageShape:
    """What a stage holds: enough to say how long its chunks take, and what they keep."""

    dense: int
    routed: int
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class ChunkMemory:
    """The chunk of a stage, run on paper."""

    stage: StageShape
    working: Working

    def run(self, op: Op, other: ChunkMemory | None = None) -> PeakMeter:
        """One instruction, from level 0: with `op` FB this chunk's backward and the `other`'s forward, in turns."""
        meter = PeakMeter()
        if op is Op.F:
            drive(self.forward(meter))
        elif op is Op.W:
            self.weight_gradients(meter)
        elif op is Op.FB:
            assert other is not None
            take_turns(self.backward(meter, deferred=False), other.forward(meter))
        else:
            drive(self.backward(meter, deferred=op is Op.I))
        return meter

    @cached_property
    def kept(self) -> float:
        """Bytes that a forward keeps."""
        return self.run(Op.F).levels[MemoryKind.ACTIVATIONS]

    @cached_property
    def waiting(self) -> float:
        """Bytes that are left between I and W."""
        return self.run(Op.I).levels[MemoryKind.DEFERRED]

    @property
    def message(self) -> float:
        """Bytes of what stages send each other."""
        return self.working.hidden

    def forward(self, meter: PeakMeter) -> Steps[None]:
        """All layers; in the last stage losses and MTP modules too."""
        meter.hold(MemoryKind.ACTIVATIONS, self.message)
        for _ in range(self.stage.dense):
            self._dense_forward(meter)
        for _ in range(self.stage.routed):
            yield from self._moe_forward(meter)
        if not self.stage.is_last:
            meter.drop(MemoryKind.ACTIVATIONS, self.message)  # the output: a message from here on
            return
        for depth in range(self.config.num_nextn_predict_layers + 1):
            if depth:
                meter.hold(MemoryKind.ACTIVATIONS, self._parts.merge.kept + self.message)
                meter.drop(MemoryKind.WORKING, self.message)  # the hidden state is kept
                yield from self._moe_forward(meter)
            self._loss_forward(meter)
        meter.drop(MemoryKind.WORKING, self.message)

    def backward(self, meter: PeakMeter, *, deferred: bool) -> Steps[None]:
        """The opposite way, with its own gradients of weights unless they are `deferred`."""
        left, parts = _Left(meter, deferred), self._parts
        meter.hold(MemoryKind.WORKING, self.message)  # the gradient that it begins with
        if self.stage.is_last:
            for _ in range(self.config.num_nextn_predict_layers + 1):
                left.finish(parts.loss)
            meter.hold(
                MemoryKind.WORKING, self.config.num_nextn_predict_layers * self.message
            )  # gradients of further depths' losses
            for _ in range(self.config.num_nextn_predict_layers):
                left.finish(parts.norm)
                yield from self._moe_backward(meter, left)
                left.finish(parts.merge)
                meter.drop(MemoryKind.WORKING, self.message)
            left.finish(parts.norm)
        for _ in range(self.stage.routed):
            yield from self._moe_backward(meter, left)
        for _ in range(self.stage.dense):
            self._dense_backward(meter, left)
        if self.stage.is_first:
            left.finish(parts.embedding)
        left.settle()
        meter.drop(MemoryKind.WORKING, self.message)

    def weight_gradients(self, meter: PeakMeter) -> None:
        """What an I has left for its W."""
        parts = self._parts
        here = [parts.embedding] * self.stage.is_first + [parts.dense] * bool(self.stage.dense)
        here += [parts.attend, parts.routed] * bool(
            self.stage.routed or self.config.num_nextn_predict_layers * self.stage.is_last
        )
        meter.work(max(part.product for part in here))
        meter.drop(MemoryKind.DEFERRED, self.waiting)

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return self.working.config

    @property
    def _parts(self) -> Parts:
        return self.working.parts

    def _moe_forward(self, meter: PeakMeter) -> Steps[None]:
        """What the phases give stays until the layer is done, also where no backward wants it."""
        working, parts = self.working, self._parts
        begun = meter.levels[MemoryKind.WORKING]
        meter.hold(MemoryKind.ACTIVATIONS, parts.attend.kept)
        meter.work(working.attend_forward)
        meter.hold(MemoryKind.WORKING, 0.0 if working.keeps_normed else self.message)
        in_turns = yield  # with the sizes alone under way
        if in_turns:
            meter.launch(working.exchange.dispatch, working.exchange.came)
            yield
        if self.config.n_shared_experts:
            meter.hold(MemoryKind.ACTIVATIONS, parts.shared.kept)
            meter.hold(MemoryKind.WORKING, self.message)  # their result
            meter.work(working.shared)
        if not in_turns:
            meter.launch(working.exchange.dispatch, working.exchange.came)
        meter.drop(MemoryKind.EXCHANGE, working.exchange.came)
        if working.batch.fp8 and not working.exchange.as_tiles:
            meter.hold(MemoryKind.WORKING, working.exchange.rows)  # as they came; else that is what is kept
        meter.hold(MemoryKind.WORKING, working.exchange.rows)  # results
        meter.hold(MemoryKind.ACTIVATIONS, parts.routed.kept)
        meter.work(working.experts)
        meter.launch(working.exchange.combine, self.message)
        yield
        meter.drop(MemoryKind.EXCHANGE, self.message)
        meter.work(2 * self.message)  # sums, and with the shared experts'
        meter.hold(MemoryKind.ACTIVATIONS, self.message)  # the output: the next layer's input
        meter.drop(MemoryKind.WORKING, meter.levels[MemoryKind.WORKING] - begun)

    def _dense_forward(self, meter: PeakMeter) -> None:
        meter.hold(MemoryKind.ACTIVATIONS, self._parts.dense.kept + self.message)
        meter.work(max(self.working.dense_attend_forward, self.working.dense + self.message))

    def _loss_forward(self, meter: PeakMeter) -> None:
        """Leaves the hidden state after the norm, which an MTP module goes on from."""
        meter.hold(MemoryKind.ACTIVATIONS, self._parts.norm.kept - self.message)
        meter.hold(MemoryKind.WORKING, self.message)
        meter.hold(MemoryKind.ACTIVATIONS, self._parts.loss.kept)
        meter.work(self.working.loss)

    def _moe_backward(self, meter: PeakMeter, left: _Left) -> Steps[None]:
        """What exchanges bring stays until the layer is done."""
        working, parts = self.working, self._parts
        begun = meter.levels[MemoryKind.WORKING]
        meter.launch(working.exchange.combine_backward, working.exchange.rows)
        left.settle()
        in_turns = yield
        if self.config.n_shared_experts:
            meter.work(working.shared_backward)
            left.finish(parts.shared)
            meter.hold(MemoryKind.WORKING, self.message)
        meter.drop(MemoryKind.EXCHANGE, working.exchange.rows)
        meter.hold(MemoryKind.WORKING, working.exchange.rows)
        meter.work(working.experts_backward)
        left.finish(parts.routed)
        meter.hold(MemoryKind.WORKING, working.exchange.rows)
        if in_turns:
            yield
        meter.launch(working.exchange.dispatch_backward, self.message)
        left.settle()
        yield
        meter.drop(MemoryKind.EXCHANGE, self.message)
        meter.hold(MemoryKind.WORKING, 2 * self.message)
        meter.work(working.attend_backward)
        left.finish(parts.attend)
        meter.drop(MemoryKind.ACTIVATIONS, self.message)
        meter.drop(MemoryKind.WORKING, meter.levels[MemoryKind.WORKING] - begun)

    def _dense_backward(self, meter: PeakMeter, left: _Left) -> None:
        meter.work(max(self.working.dense_backward, self.working.dense_attend_backward))
        left.finish(self._parts.dense)
        meter.drop(MemoryKind.ACTIVATIONS, self.message)


class _Left:
    """Work for weights that a backward leaves for its next moment, or for W."""

    def __init__(self, meter: PeakMeter, deferred: bool) -> None:
        self._meter, self._deferred = meter, deferred
        self._held = self._product = 0.0

    def finish(self, part: PartSize) -> None:
        """A part's backward of inputs is done: what it kept goes, but for what gradients of weights take."""
        self._meter.drop(MemoryKind.ACTIVATIONS, part.kept)
        self._meter.hold(MemoryKind.DEFERRED, part.put_off)
        self._held += part.put_off
        self._product = max(self._product, part.product)

    def settle(self) -> None:
        """Form them, unless all are put off."""
        if self._deferred:
            return
        self._meter.work(self._product)
        self._meter.drop(MemoryKind.DEFERRED, self._held)
        self._held = self._product = 0.0
