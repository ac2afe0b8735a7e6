"""Bytes that a part of a stage needs while it runs, beyond what is kept before and after it.

Each figure is the worst moment of the code that it names, counted in whole tensors: `trainer/model/`, and
`trainer/precision/` for FP8.

Letters: T tokens, R rows received, D hidden, F inner width of an expert, N and K sides of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil

from ...comm.fp8 import TILE
from ..model.config import ModelConfig
from ..model.loss import chunk_tokens
from ..model.recompute import RecomputeModule
from .activations import (
    INPUT,
    NORMED,
    Kept,
    MicroBatch,
    attend,
    columns_bytes,
    dense_layer,
    final_norm,
    kept_bytes,
    loss,
    made_bytes,
    merge,
    routed,
    shared,
    tables,
    waiting_bytes,
)
from .buffers import Buffers, ExchangeFormats

_WIDER = 8  # bytes: the reference provider multiplies FP8 numbers in FP64


@dataclass(frozen=True)
class Working:
    """What one micro-batch needs at work, by part of a stage."""

    config: ModelConfig
    batch: MicroBatch
    policy: frozenset[RecomputeModule]
    wire: ExchangeFormats
    local_experts: int

    @property
    def hidden(self) -> float:
        """One hidden state, T × D."""
        return self.batch.tokens * self.config.hidden_size * self.batch.size

    @cached_property
    def exchange(self) -> Buffers:
        """Of a token exchange."""
        return Buffers(self.config, self.batch, self.wire)

    @cached_property
    def parts(self) -> Parts:
        """What each part of a stage keeps."""
        return Parts.of(self)

    @cached_property
    def keeps_normed(self) -> bool:
        """Whether the tokens for the experts are kept as they are."""
        return any(kept.what == NORMED and kept.part not in self.policy for kept in self._attend)

    @cached_property
    def _attend(self) -> list[Kept]:
        return attend(self.config, self.batch)

    @cached_property
    def attend_forward(self) -> float:
        """See `_attend_forward`, of a routed layer."""
        return self._attend_forward(self._attend)

    @cached_property
    def attend_backward(self) -> float:
        """See `_attend_backward`, of a routed layer."""
        return self._attend_backward(self._attend)

    @cached_property
    def dense_attend_forward(self) -> float:
        """See `_attend_forward`, of a dense layer."""
        return self._attend_forward(dense_layer(self.config, self.batch))

    @cached_property
    def dense_attend_backward(self) -> float:
        """See `_attend_backward`, of a dense layer."""
        return self._attend_backward(dense_layer(self.config, self.batch))

    @cached_property
    def dense(self) -> float:
        """See `_feed_forward`, of a dense layer."""
        return self._feed_forward(self.batch.tokens, self.config.intermediate_size)

    @cached_property
    def dense_backward(self) -> float:
        """See `_feed_forward_backward`, of a dense layer."""
        return self._feed_forward_backward(self.batch.tokens, self.config.intermediate_size)

    @cached_property
    def shared(self) -> float:
        """See `_feed_forward`, of the shared experts."""
        return self._feed_forward(self.batch.tokens, self.config.n_shared_experts * self.config.moe_intermediate_size)

    @cached_property
    def shared_backward(self) -> float:
        """See `_feed_forward_backward`, of the shared experts."""
        return self._feed_forward_backward(
            self.batch.tokens, self.config.n_shared_experts * self.config.moe_intermediate_size
        )

    def _attend_forward(self, items: list[Kept]) -> float:
        """Up to the projection behind attention everything is still here, also what the policy then drops."""
        dropped = made_bytes(items, self.policy)
        if self.batch.fp8:  # tiles are kept in its place
            heads = self.config.num_attention_heads * self.config.v_head_dim
            latents = (self.config.q_lora_rank or 0) + self.config.kv_lora_rank
            dropped += self.batch.tokens * (self.config.hidden_size + latents + heads) * self.batch.size
        return (
            dropped
            + self.hidden
            + self._product(self.batch.tokens, self.config.num_attention_heads * self.config.v_head_dim)
        )

    def _attend_backward(self, items: list[Kept]) -> float:
        """At the attention core: gradients of its four tensors, of the residual stream, and of the norm behind it."""
        model, size = self.config, self.batch.size
        heads = model.num_attention_heads * (2 * model.qk_head_dim + 2 * model.v_head_dim)
        again = made_bytes(items, self.policy)
        grads = self.batch.tokens * (heads + 2 * model.hidden_size) * size
        return again + grads + self._product(self.batch.tokens, model.num_attention_heads * model.v_head_dim)

    def _feed_forward(self, rows: float, inner: int, experts: int = 1) -> float:
        """Gate, up and SwiGLU, where they are not kept; without the result."""
        kept = 0 if self.batch.fp8 else sum(width for width, part in _INNER if part not in self.policy)
        return rows * (3 - kept) * inner * self.batch.size + self._product(rows, 2 * inner, experts)

    def _feed_forward_backward(self, rows: float, inner: int, experts: int = 1) -> float:
        """At SwiGLU: its two gradients, and two products on their way; later the gradient of the rows."""
        again = 3 if self.batch.fp8 else sum(width for width, part in _INNER if part in self.policy)
        wide = 2 * self.batch.wide if self.batch.size < self.batch.wide else 0
        made = rows * inner * (5 * self.batch.size + wide)
        grads = max(made, rows * (self.config.hidden_size + inner) * self.batch.size)
        in_fp8 = max(self._product(rows, 2 * inner, experts), self._quantized(rows, 2 * inner, experts))
        return rows * again * inner * self.batch.size + grads + in_fp8

    @cached_property
    def experts(self) -> float:
        """`_feed_forward` of the routed ones, at once or in blocks."""
        return self._feed_forward(self._at_once, self.config.moe_intermediate_size, self.local_experts)

    @cached_property
    def experts_backward(self) -> float:
        """The same; a block also makes its results and their gradients, and gradients of weights; in FP8 no rows."""
        at_once, inner = self._at_once, self.config.moe_intermediate_size
        backward = self._feed_forward_backward(at_once, inner, self.local_experts)
        if not self.batch.in_blocks(self.config):
            return backward
        wide = 2 if self.batch.fp8 else 3
        made = at_once * (3 * inner + wide * self.config.hidden_size) * self.batch.size
        return made + max(backward, self.expert_weights)

    @property
    def _at_once(self) -> float:
        rows = self.batch.received(self.config)
        return min(rows, self.batch.block) if self.batch.block is not None else rows

    @cached_property
    def expert_weights(self) -> float:
        """Gradients of all experts' gate and up projections, where they are not added in the products."""
        outputs, inputs = 2 * self.config.moe_intermediate_size, self.config.hidden_size
        elements = self.local_experts * outputs * inputs
        if self.batch.fp8:  # one expert after the other, then stacked
            rows = self.batch.received(self.config) / self.local_experts
            return elements * 2 * self.batch.wide + self._outer(rows, inputs, outputs)
        return elements * (self.batch.size + self._widened) if self.batch.size < self.batch.wide else 0.0

    def dense_weights(self, inputs: int, outputs: int) -> float:
        """Gradient of one weight before it is added to the one that is there. On a GPU, FP8's `triton` adds in the
        product and makes none; the other providers make this much."""
        if self.batch.fp8:
            return inputs * outputs * 2 * self.batch.wide + self._outer(self.batch.tokens, inputs, outputs)
        return inputs * outputs * (self.batch.size + self._widened) if self.batch.size < self.batch.wide else 0

    @cached_property
    def loss(self) -> float:
        """Logits of a chunk of tokens, in FP32 at least and in the compute dtype; and their part of the gradient of
        the head, where that is not added in the product."""
        tokens = min(self.batch.tokens, chunk_tokens(self.config.vocab_size, on_gpu=not self.batch.on_cpu))
        narrow = self.batch.size if self.batch.size < self.batch.wide else 0
        logits = tokens * self.config.vocab_size * (self.batch.wide + narrow)
        return logits + self.config.vocab_size * self.config.hidden_size * (narrow + self._widened)

    @property
    def _widened(self) -> int:
        """Bytes of a number of a gradient that is added to one of a wider dtype: a CPU makes a copy of that first."""
        return self.batch.wide if self.batch.on_cpu and self.batch.size < self.batch.wide else 0

    def _outer(self, rows: float, inputs: int, outputs: int) -> float:
        """What the reference provider needs for a gradient of one weight: factors in FP64, a tile's sum in it."""
        if not self.batch.on_cpu:
            return 0.0
        return TILE * ceil(rows / TILE) * (inputs + outputs) * _WIDER + inputs * outputs * (_WIDER + self.batch.wide)

    @cached_property
    def embedding_weights(self) -> float:
        """Rows of the gradient, one for a token, and as many in the gradient's dtype where that is wider."""
        copies = 2 if self.batch.size < self.batch.wide else 1
        return copies * self.batch.tokens * self.config.hidden_size * self.batch.wide

    def _product(self, rows: float, outputs: int, experts: int = 1) -> float:
        """What the reference provider needs for one product in FP8: both factors in FP64, and sums on their way.

        It multiplies for one expert after the other, and joins what it has got.
        """
        if not (self.batch.fp8 and self.batch.on_cpu):
            return 0.0
        one, hidden = rows / experts, self.config.hidden_size
        joined = 2 * rows * outputs * self.batch.size if experts > 1 else 0.0
        return one * hidden * _WIDER + outputs * hidden * _WIDER + one * outputs * 2 * _WIDER + joined

    def _quantized(self, rows: float, width: int, experts: int) -> float:
        """What the reference provider needs to quantize columns: whole tiles, turned, and divided by their scales."""
        if not (self.batch.fp8 and self.batch.on_cpu):
            return 0.0
        return 3 * experts * TILE * ceil(rows / experts / TILE) * width * self.batch.wide


_INNER = ((2, RecomputeModule.GATE_UP), (1, RecomputeModule.SWIGLU))
"""Widths in F of what a feed-forward network makes inside, and what may make it again."""


@dataclass(frozen=True)
class PartSize:
    """Of one part of a stage, bytes."""

    kept: float
    """By its forward."""
    put_off: float
    """Between its backward of inputs and that of weights."""
    product: float
    """The largest gradient of a weight on its way."""


@dataclass(frozen=True)
class Parts:
    """Of each part. A layer's input, which is the output of another part, is in none of them."""

    attend: PartSize
    shared: PartSize
    routed: PartSize
    """With the routing tables."""
    dense: PartSize
    """A whole dense layer."""
    embedding: PartSize
    norm: PartSize
    """Behind the last layer; with that layer's output."""
    loss: PartSize
    merge: PartSize
    """Of an MTP module."""

    @staticmethod
    def of(working: Working) -> Parts:
        """From shapes."""
        config, batch, hidden = working.config, working.batch, working.hidden
        first, network, experts = _gradients(config, batch, working.local_experts, dense=False)
        dense_first, dense_network, _ = _gradients(config, batch, working.local_experts, dense=True)

        def part(items: list[Kept], gradients: float = 0.0, product: float = 0.0) -> PartSize:
            items = [kept for kept in items if kept.what != INPUT]
            return PartSize(kept_bytes(items, working.policy), waiting_bytes(items) + gradients, product)

        heads = config.num_attention_heads * max(config.qk_head_dim, config.qk_nope_head_dim + config.v_head_dim)
        attention = working.dense_weights(max(config.q_lora_rank or config.hidden_size, config.kv_lora_rank), heads)
        inner = working.dense_weights(config.hidden_size, 2 * config.intermediate_size)
        both = working.dense_weights(config.hidden_size, 2 * config.n_shared_experts * config.moe_intermediate_size)
        rows = [*routed(config, batch), tables(config, batch)]
        return Parts(
            attend=part(attend(config, batch), first, attention),
            shared=part(shared(config, batch), network, both),
            routed=part(rows, experts, working.expert_weights),
            dense=part(dense_layer(config, batch), dense_first + dense_network, max(attention, inner)),
            embedding=PartSize(0.0, hidden, working.embedding_weights),
            norm=part(final_norm(config, batch)),
            loss=part(loss(config, batch)),
            merge=part(merge(config, batch), 2 * hidden, working.embedding_weights),
        )


def _gradients(
    config: ModelConfig, batch: MicroBatch, local_experts: int, *, dense: bool
) -> tuple[float, float, float]:
    """Gradients of outputs that products for weights still need: of attention, of shared experts or the dense layer's
    network, and of routed experts; none of these in blocks."""
    tokens, rows = batch.tokens, batch.received(config)
    heads, query_rank = config.num_attention_heads, config.q_lora_rank
    widths = [heads * config.qk_head_dim, config.kv_lora_rank + config.qk_rope_head_dim]
    widths += [heads * (config.qk_nope_head_dim + config.v_head_dim), config.hidden_size]
    widths += [] if query_rank is None else [query_rank]
    router = 0.0 if dense else tokens * config.n_routed_experts * batch.wide
    inner = config.intermediate_size if dense else config.n_shared_experts * config.moe_intermediate_size
    both = [2 * inner, config.hidden_size] if inner else []
    expert = [2 * config.moe_intermediate_size, config.hidden_size]
    if batch.fp8:  # SwiGLU's result, made again, is a factor too
        attended = sum(columns_bytes(tokens, width) for width in widths)
        network = sum(columns_bytes(tokens, width) for width in (*both, *([inner] if inner else [])))
        experts = sum(columns_bytes(rows, width, local_experts) for width in (*expert, config.moe_intermediate_size))
    else:
        attended, network, experts = (
            count * sum(each) * batch.size for count, each in ((tokens, widths), (tokens, both), (rows, expert))
        )
    return attended + router, network, 0.0 if batch.in_blocks(config) else experts
