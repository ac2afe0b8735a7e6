"""The memory of one chunk while it runs: what its forward keeps, its backward frees, and both need at their worst.

The counterpart of `trainer/model/chunk.py`: generators that yield where those do, so that the two halves of an FB take
turns here as they do there. They move levels of a `Meter` and no tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from ...parallelism.pipeline.overlap import Steps, drive, take_turns
from ...parallelism.pipeline.program import Op
from ..model.config import ModelConfig
from .activations import (
    Kept,
    attend,
    dense_layer,
    final_norm,
    kept_bytes,
    loss,
    merge,
    routed,
    shared,
    tables,
    waiting_bytes,
)
from .working import Deferred, Working


class Kind(StrEnum):
    """What activations, and all that comes and goes within a step, are for."""

    ACTIVATIONS = "activations"  # that a forward keeps for its backward
    DEFERRED = "deferred"  # factors of gradients of weights that are put off
    MESSAGES = "messages"  # between stages, on their way or waiting
    EXCHANGE = "exchange"  # buffers of a token exchange under way
    WORKING = "working"  # what a part of a stage needs while it runs


@dataclass
class Meter:
    """Levels that rise and fall, and what they were when their sum was largest."""

    levels: dict[Kind, float] = field(default_factory=lambda: dict.fromkeys(Kind, 0.0))
    peak: dict[Kind, float] = field(default_factory=lambda: dict.fromkeys(Kind, 0.0))

    def hold(self, kind: Kind, size: float) -> None:
        """From here on, so much more."""
        self.levels[kind] += size
        if sum(self.levels.values()) > sum(self.peak.values()):
            self.peak = dict(self.levels)

    def drop(self, kind: Kind, size: float) -> None:
        """So much less."""
        self.levels[kind] -= size

    def work(self, size: float) -> None:
        """For a moment, so much more at work."""
        self.hold(Kind.WORKING, size)
        self.drop(Kind.WORKING, size)


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

    def run(self, op: Op, other: ChunkMemory | None = None) -> Meter:
        """One instruction, from level 0: with `op` FB this chunk's backward and the `other`'s forward, in turns."""
        meter = Meter()
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
        return self.run(Op.F).levels[Kind.ACTIVATIONS]

    @cached_property
    def waiting(self) -> float:
        """Bytes that are left between I and W."""
        return self.run(Op.I).levels[Kind.DEFERRED]

    @property
    def message(self) -> float:
        """Bytes of what stages send each other."""
        return self.working.hidden

    def forward(self, meter: Meter) -> Steps[None]:
        """All layers; in the last stage losses and MTP modules too."""
        meter.hold(Kind.ACTIVATIONS, self.message)
        for _ in range(self.stage.dense):
            self._dense_forward(meter)
        for _ in range(self.stage.routed):
            yield from self._moe_forward(meter)
        if not self.stage.is_last:
            meter.drop(Kind.ACTIVATIONS, self.message)  # the output: a message from here on
            return
        for depth in range(self.config.mtp_depth + 1):
            if depth:
                meter.hold(Kind.ACTIVATIONS, self._kept(self._merge) + self.message)
                meter.drop(Kind.WORKING, self.message)  # the hidden state is kept
                yield from self._moe_forward(meter)
            self._loss_forward(meter)
        meter.drop(Kind.WORKING, self.message)

    def backward(self, meter: Meter, *, deferred: bool) -> Steps[None]:
        """The opposite way, with its own gradients of weights unless they are `deferred`."""
        left = _Left(meter, self, deferred)
        meter.hold(Kind.WORKING, self.message)  # the gradient that it begins with
        if self.stage.is_last:
            for _ in range(self.config.mtp_depth + 1):
                self._loss_backward(meter, left)
            meter.hold(Kind.WORKING, self.config.mtp_depth * self.message)  # gradients of further depths' losses
            for _ in range(self.config.mtp_depth):
                self._finish(meter, left, self._final_norm, 0.0, 0.0)
                yield from self._moe_backward(meter, left)
                self._finish(meter, left, self._merge, self._merge_gradients, self.working.embedding_weights())
                meter.drop(Kind.WORKING, self.message)
            self._finish(meter, left, self._final_norm, 0.0, 0.0)
        for _ in range(self.stage.routed):
            yield from self._moe_backward(meter, left)
        for _ in range(self.stage.dense):
            self._dense_backward(meter, left)
        if self.stage.is_first:
            left.put_off(self.message, self.working.embedding_weights())
        left.settle()
        meter.drop(Kind.WORKING, self.message)

    def weight_gradients(self, meter: Meter) -> None:
        """What an I has left for its W."""
        meter.work(self._largest_weights)
        meter.drop(Kind.DEFERRED, self.waiting)

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return self.working.config

    def _kept(self, items: Sequence[Kept]) -> float:
        return kept_bytes(items, self.working.policy)

    @cached_property
    def _attend(self) -> list[Kept]:
        return [kept for kept in attend(self.config, self.working.batch) if kept.what != "input"]

    @cached_property
    def _shared(self) -> list[Kept]:
        return shared(self.config, self.working.batch)

    @cached_property
    def _routed(self) -> list[Kept]:
        return routed(self.config, self.working.batch)

    @cached_property
    def _dense(self) -> list[Kept]:
        return [kept for kept in dense_layer(self.config, self.working.batch) if kept.what != "input"]

    @cached_property
    def _merge(self) -> list[Kept]:
        return merge(self.config, self.working.batch)

    @cached_property
    def _final_norm(self) -> list[Kept]:
        return final_norm(self.config, self.working.batch)

    @cached_property
    def _loss(self) -> list[Kept]:
        return loss(self.config, self.working.batch)

    @cached_property
    def _tables(self) -> float:
        return tables(self.config, self.working.batch).bytes

    @cached_property
    def _gradients(self) -> Deferred:
        return Deferred.of(self.config, self.working.batch, self.working.local_experts, dense=False)

    @cached_property
    def _dense_gradients(self) -> Deferred:
        return Deferred.of(self.config, self.working.batch, self.working.local_experts, dense=True)

    @property
    def _merge_gradients(self) -> float:
        """Of the projection's output, and of the embedding."""
        return 2 * self.message

    def _moe_forward(self, meter: Meter) -> Steps[None]:
        """What the phases give stays until the layer is done, also where no backward wants it."""
        working, batch = self.working, self.working.batch
        begun = meter.levels[Kind.WORKING]
        meter.hold(Kind.ACTIVATIONS, self._kept(self._attend))
        meter.work(working.attend_forward(self._attend))
        meter.hold(Kind.WORKING, 0.0 if self._keeps_normed else self.message)
        meter.hold(Kind.EXCHANGE, working.dispatch())
        yield
        inner = self.config.shared_experts * self.config.expert_ffn
        if inner:
            meter.hold(Kind.ACTIVATIONS, self._kept(self._shared))
            meter.hold(Kind.WORKING, self.message)  # their result
            meter.work(working.feed_forward(batch.tokens, inner))
        meter.drop(Kind.EXCHANGE, working.dispatch())
        meter.hold(Kind.WORKING, working.rows if batch.fp8 else 0.0)  # as they came; else they are what is kept
        meter.hold(Kind.WORKING, working.rows)  # results
        meter.hold(Kind.ACTIVATIONS, self._kept(self._routed) + self._tables)
        meter.work(working.experts())
        meter.hold(Kind.EXCHANGE, working.combine())
        yield
        meter.drop(Kind.EXCHANGE, working.combine())
        meter.work(2 * self.message)  # sums, and with the shared experts'
        meter.hold(Kind.ACTIVATIONS, self.message)  # the output: the next layer's input
        meter.drop(Kind.WORKING, meter.levels[Kind.WORKING] - begun)

    @property
    def _keeps_normed(self) -> bool:
        wanted = "norm before the feed-forward network"
        return any(kept.what == wanted and kept.part not in self.working.policy for kept in self._attend)

    def _dense_forward(self, meter: Meter) -> None:
        working = self.working
        network = working.feed_forward(working.batch.tokens, self.config.dense_ffn)
        meter.hold(Kind.ACTIVATIONS, self._kept(self._dense) + self.message)
        meter.work(max(working.attend_forward(self._dense), network + self.message))

    def _loss_forward(self, meter: Meter) -> None:
        """Leaves the hidden state after the norm, which an MTP module goes on from."""
        meter.hold(Kind.ACTIVATIONS, self._kept(self._final_norm) - self.message)
        meter.hold(Kind.WORKING, self.message)
        meter.hold(Kind.ACTIVATIONS, self._kept(self._loss))
        meter.work(self.working.loss())

    def _loss_backward(self, meter: Meter, left: _Left) -> None:
        """The gradients were formed forward: that of the head is added later."""
        meter.drop(Kind.ACTIVATIONS, self._kept(self._loss))
        left.put_off(waiting_bytes(self._loss), 0.0)

    def _moe_backward(self, meter: Meter, left: _Left) -> Steps[None]:
        """What exchanges bring stays until the layer is done."""
        working, batch = self.working, self.working.batch
        begun = meter.levels[Kind.WORKING]
        inner = self.config.shared_experts * self.config.expert_ffn
        meter.hold(Kind.EXCHANGE, working.combine_backward())
        left.settle()
        yield
        if inner:
            meter.work(working.feed_forward_backward(batch.tokens, inner))
            self._finish(
                meter, left, self._shared, self._gradients.shared, working.dense_weights(self.config.hidden, 2 * inner)
            )
            meter.hold(Kind.WORKING, self.message)
        meter.drop(Kind.EXCHANGE, working.combine_backward())
        meter.hold(Kind.WORKING, working.rows)
        meter.work(working.experts_backward())
        self._finish(meter, left, self._routed, self._gradients.routed, working.expert_weights())
        meter.hold(Kind.WORKING, working.rows)
        meter.hold(Kind.EXCHANGE, working.dispatch_backward())
        left.settle()
        yield
        meter.drop(Kind.EXCHANGE, working.dispatch_backward())
        meter.hold(Kind.WORKING, 2 * self.message)
        meter.work(working.attend_backward(self._attend))
        self._finish(meter, left, self._attend, self._gradients.attend, self._attention_weights)
        meter.drop(Kind.ACTIVATIONS, self._tables + self.message)
        meter.drop(Kind.WORKING, meter.levels[Kind.WORKING] - begun)

    def _dense_backward(self, meter: Meter, left: _Left) -> None:
        working, tokens, inner = self.working, self.working.batch.tokens, self.config.dense_ffn
        meter.work(max(working.feed_forward_backward(tokens, inner), working.attend_backward(self._dense)))
        weights = max(self._attention_weights, working.dense_weights(self.config.hidden, 2 * inner))
        both = self._dense_gradients
        self._finish(meter, left, self._dense, both.attend + both.shared, weights)
        meter.drop(Kind.ACTIVATIONS, self.message)

    @property
    def _attention_weights(self) -> float:
        config = self.config
        heads = config.heads * max(config.qk_head_dim, config.qk_nope_head_dim + config.v_head_dim)
        return self.working.dense_weights(max(config.q_lora_rank or config.hidden, config.kv_lora_rank), heads)

    @property
    def _largest_weights(self) -> float:
        """Of all products for weights that a W makes."""
        sizes = [self._attention_weights]
        sizes += [self.working.expert_weights()] if self.stage.routed else []
        sizes += [self.working.dense_weights(self.config.hidden, 2 * self.config.dense_ffn)] if self.stage.dense else []
        sizes += [self.working.embedding_weights()] if self.stage.is_first else []
        return max(sizes)

    def _finish(self, meter: Meter, left: _Left, items: Sequence[Kept], gradients: float, weights: float) -> None:
        """A part's backward of inputs is done: what it kept goes, but for what gradients of weights take."""
        meter.drop(Kind.ACTIVATIONS, self._kept(items))
        left.put_off(waiting_bytes(items) + gradients, weights)


class _Left:
    """Work for weights that a backward leaves for its next moment, or for W."""

    def __init__(self, meter: Meter, chunk: ChunkMemory, deferred: bool) -> None:
        self._meter, self._deferred = meter, deferred
        self._held = 0.0
        self._products: list[float] = []

    def put_off(self, held: float, product: float) -> None:
        """A product that needs `product` bytes when it is formed, and holds its factors until then."""
        self._meter.hold(Kind.DEFERRED, held)
        self._held += held
        self._products.append(product)

    def settle(self) -> None:
        """Form them, unless all are put off."""
        if self._deferred:
            return
        self._meter.work(max(self._products, default=0.0))
        self._meter.drop(Kind.DEFERRED, self._held)
        self._held = 0.0
        self._products.clear()
