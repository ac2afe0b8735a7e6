"""Bytes that a part of a stage needs while it runs, beyond what is kept before and after it; and those of exchanges.

Each figure is the worst moment of the code that it names, counted in whole tensors: `trainer/model/` for the parts,
`trainer/precision/` for FP8, `comm/flat.py` and `comm/two_hop.py` for exchanges.

Letters: T tokens, R rows received, D hidden, F inner width of an expert, N and K sides of a weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...comm.fp8 import tiles_of
from ..model.config import ModelConfig
from ..model.loss import chunk_tokens
from ..model.recompute import Part
from .activations import Kept, MicroBatch, columns_bytes, made_bytes

_WIDER = 8  # bytes: the reference provider multiplies FP8 numbers in FP64


@dataclass(frozen=True)
class Wire:
    """How rows travel to the experts and back."""

    ranks: int = 1
    """Over which the experts of a layer are spread."""
    dispatch: int | None = None
    """Bytes of a number on the way to the experts; None: as it is computed with."""
    combine: int | None = None
    combine_backward: int | None = None
    dispatch_backward: int | None = None
    once_a_rank: bool = False
    """Whether a token crosses once to each rank that needs it, and not once for each of its experts."""

    def visited(self, config: ModelConfig) -> float:
        """How many rows of one token cross: what even routing gives on average."""
        if not self.once_a_rank:
            return float(config.top_k)
        return self.ranks * (1 - (1 - 1 / self.ranks) ** config.top_k)


@dataclass(frozen=True)
class Working:
    """What one micro-batch needs at work, by part of a stage."""

    config: ModelConfig
    batch: MicroBatch
    policy: frozenset[Part]
    wire: Wire
    local_experts: int

    @property
    def hidden(self) -> float:
        """One hidden state, T × D."""
        return self.batch.tokens * self.config.hidden * self.batch.size

    @property
    def rows(self) -> float:
        """What the experts receive, and what they give, R × D."""
        return self.batch.received(self.config) * self.config.hidden * self.batch.size

    def attend_forward(self, items: Iterable[Kept]) -> float:
        """Up to the projection behind attention everything is still here, also what the policy then drops."""
        items = list(items)
        dropped = made_bytes(items, self.policy)
        if self.batch.fp8:  # tiles are kept in its place
            heads = self.config.heads * self.config.v_head_dim
            latents = (self.config.q_lora_rank or 0) + self.config.kv_lora_rank
            dropped += self.batch.tokens * (self.config.hidden + latents + heads) * self.batch.size
        return dropped + self.hidden + self._product(self.batch.tokens, self.config.heads * self.config.v_head_dim)

    def attend_backward(self, items: Iterable[Kept]) -> float:
        """At the attention core: gradients of its four tensors, of the residual stream, and of the norm behind it."""
        model, size = self.config, self.batch.size
        heads = model.heads * (2 * model.qk_head_dim + 2 * model.v_head_dim)
        again = made_bytes(items, self.policy)
        grads = self.batch.tokens * (heads + 2 * model.hidden) * size
        return again + grads + self._product(self.batch.tokens, model.heads * model.v_head_dim)

    def feed_forward(self, rows: float, inner: int) -> float:
        """Gate, up and SwiGLU, where they are not kept; without the result."""
        kept = 0 if self.batch.fp8 else sum(width for width, part in _INNER if part not in self.policy)
        return rows * (3 - kept) * inner * self.batch.size + self._product(rows, 2 * inner)

    def feed_forward_backward(self, rows: float, inner: int) -> float:
        """At SwiGLU: its two gradients, and two products on their way; later the gradient of the rows."""
        again = 3 if self.batch.fp8 else sum(width for width, part in _INNER if part in self.policy)
        wide = 2 * self.batch.wide if self.batch.size < self.batch.wide else 0
        made = rows * inner * (5 * self.batch.size + wide)
        grads = max(made, rows * (self.config.hidden + inner) * self.batch.size)
        return rows * again * inner * self.batch.size + grads + self._product(rows, 2 * inner)

    def experts(self) -> float:
        """`feed_forward` of the routed ones, at once or in blocks."""
        return self.feed_forward(self._at_once, self.config.expert_ffn)

    def experts_backward(self) -> float:
        """The same; a block also makes its results and their gradients, and gradients of weights."""
        at_once, inner = self._at_once, self.config.expert_ffn
        if not self.batch.in_blocks(self.config):
            return self.feed_forward_backward(at_once, inner)
        made = at_once * (3 * inner + 3 * self.config.hidden) * self.batch.size
        return made + self.feed_forward_backward(at_once, inner) + self.expert_weights()

    @property
    def _at_once(self) -> float:
        rows = self.batch.received(self.config)
        return min(rows, self.batch.block) if self.batch.block is not None else rows

    def expert_weights(self) -> float:
        """Gradients of all experts' gate and up projections, before they are added to those that are there."""
        elements = self.local_experts * 2 * self.config.expert_ffn * self.config.hidden
        if self.batch.fp8:  # one expert after the other, then stacked
            return elements * self.batch.wide * 2
        return elements * self.batch.size

    def dense_weights(self, inputs: int, outputs: int) -> float:
        """Gradient of one weight before it is added to the one that is there."""
        if self.batch.fp8:
            rows = self.batch.tokens if self.batch.on_cpu else 0
            return inputs * outputs * self.batch.wide * 2 + rows * (inputs + outputs) * _WIDER
        return inputs * outputs * self.batch.size if self.batch.size < self.batch.wide else 0

    def loss(self) -> float:
        """Logits of a chunk of tokens, in FP32 at least and in the compute dtype."""
        tokens = min(self.batch.tokens, chunk_tokens(self.config.vocabulary))
        narrow = self.batch.size < self.batch.wide
        logits = tokens * self.config.vocabulary * (self.batch.wide + narrow * self.batch.size)
        return logits + narrow * self.config.vocabulary * self.config.hidden * self.batch.size

    def embedding_weights(self) -> float:
        """The gradient of the whole table, before it is added."""
        return (self.config.vocabulary * self.config.hidden + self.batch.tokens * self.config.hidden) * self.batch.wide

    def _product(self, rows: float, outputs: int) -> float:
        """What the reference provider needs for one product in FP8: both operands in FP64, and sums on their way."""
        if not (self.batch.fp8 and self.batch.on_cpu):
            return 0.0
        hidden = self.config.hidden
        return rows * hidden * _WIDER + outputs * hidden * _WIDER + rows * outputs * 2 * _WIDER

    def dispatch(self) -> float:
        """Tokens to rows for the experts, with their gates; the rows are among it."""
        if self.wire.ranks == 1:
            return self.rows
        return self._forth(self.wire.dispatch, beside=True)

    def combine_backward(self) -> float:
        """The same of gradients, alone."""
        if self.wire.ranks == 1:
            return self.rows
        return self._forth(self.wire.combine_backward, beside=False)

    def combine(self) -> float:
        """Results to their sums; the sums are among it."""
        return self._back(self.wire.combine, beside=False)

    def dispatch_backward(self) -> float:
        """The same of gradients, with those of gates."""
        return self._back(self.wire.dispatch_backward, beside=True)

    def _forth(self, element: int | None, *, beside: bool) -> float:
        """What is sent, what arrives, the same by expert, and where something travels beside it the rows alone."""
        sent, rows = self.batch.tokens * self.wire.visited(self.config), self.batch.received(self.config)
        payload = self._row(element)
        message = payload + (self.batch.wide if beside else 0)
        alone = rows * payload if beside else 0.0
        decoded = self.rows if element is not None and element != self.batch.size else 0.0
        if self.wire.once_a_rank:
            return 2 * sent * message + sent * payload + self.rows + decoded
        return sent * message + 2 * rows * message + alone + decoded

    def _back(self, element: int | None, *, beside: bool) -> float:
        """What is sent, what arrives, and where something travels beside it the rows alone; sums of them in FP32."""
        sent, rows = self.batch.tokens * self.wire.visited(self.config), self.batch.received(self.config)
        sums = self.batch.tokens * self.config.hidden * self.batch.wide
        if self.batch.size < self.batch.wide:  # what is summed is widened before, and the sums rounded
            sums += sent * self.config.hidden * self.batch.wide + self.hidden
        if self.wire.ranks == 1:
            return sums
        payload = self._row(element)
        message = payload + (self.batch.wide if beside else 0)
        alone = sent * payload if beside else 0.0
        decoded = sent * self.config.hidden * self.batch.size if element not in (None, self.batch.size) else 0.0
        ours = sent if self.wire.once_a_rank else rows
        return ours * message + sent * message + alone + decoded + sums

    def _row(self, element: int | None) -> float:
        scales = tiles_of(self.config.hidden) if element == 1 else 0
        return self.config.hidden * (self.batch.size if element is None else element) + scales


_INNER = ((2, Part.GATE_UP), (1, Part.SWIGLU))
"""Widths in F of what a feed-forward network makes inside, and what may make it again."""


@dataclass(frozen=True)
class Deferred:
    """Gradients of outputs that products for weights still need: bytes, by part of a layer."""

    attend: float
    shared: float
    routed: float

    @staticmethod
    def of(config: ModelConfig, batch: MicroBatch, local_experts: int, *, dense: bool) -> Deferred:
        """Of one layer; a dense layer's network is its `shared` one."""
        tokens, rows = batch.tokens, batch.received(config)
        heads, query_rank = config.heads, config.q_lora_rank
        widths = [heads * config.qk_head_dim, config.kv_lora_rank + config.qk_rope_head_dim]
        widths += [heads * (config.qk_nope_head_dim + config.v_head_dim), config.hidden]
        widths += [] if query_rank is None else [query_rank]
        router = 0.0 if dense else tokens * config.experts * batch.wide
        inner = config.dense_ffn if dense else config.shared_experts * config.expert_ffn
        both = [2 * inner, config.hidden] if inner else []
        expert = [2 * config.expert_ffn, config.hidden]
        if not batch.fp8:
            attended, network, routed = (
                count * sum(each) * batch.size for count, each in ((tokens, widths), (tokens, both), (rows, expert))
            )
        else:  # SwiGLU's result, made again, is a factor too
            attended = sum(columns_bytes(tokens, width) for width in widths)
            network = sum(columns_bytes(tokens, width) for width in (*both, *([inner] if inner else [])))
            routed = sum(columns_bytes(rows, width, local_experts) for width in (*expert, config.expert_ffn))
        if dense or batch.in_blocks(config):
            routed = 0.0
        return Deferred(attended + router, network, routed)
