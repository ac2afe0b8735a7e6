"""Workspace of a stage's parts: bytes that a part needs while it runs, beyond what is saved before and after it.

Each figure is the peak of the named code, counted in whole tensors: `trainer/model/`, and `trainer/precision/` for FP8.

Letters: T tokens, R rows received, D hidden, F inner width of an expert, N and K sides of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil

from ...comm.fp8 import TILE_WIDTH
from ..model.config import ModelConfig
from ..model.loss import tokens_per_logit_block
from ..model.recompute import RecomputeModule
from .activations import (
    FFN_NORM_OUTPUT,
    LAYER_INPUT,
    MicroBatchShape,
    SavedActivation,
    attention_activations,
    columnwise_fp8_bytes,
    dense_layer_activations,
    final_norm_activations,
    loss_activations,
    mtp_merge_activations,
    recomputed_bytes,
    routed_expert_activations,
    routing_table_memory,
    saved_bytes,
    shared_expert_activations,
    wgrad_input_bytes,
)
from .exchange_buffers import ExchangeBufferBytes, ExchangeFormats

_FP64 = 8  # bytes: the reference backend multiplies FP8 numbers in FP64


@dataclass(frozen=True)
class WorkspaceBytes:
    """Workspace of one micro-batch by part of a stage, in bytes."""

    config: ModelConfig
    batch: MicroBatchShape
    recompute_modules: frozenset[RecomputeModule]
    formats: ExchangeFormats
    local_experts: int

    @property
    def hidden_state_bytes(self) -> float:
        """Bytes of one hidden state, T × D."""
        return self.batch.tokens * self.config.hidden_size * self.batch.element_bytes

    @cached_property
    def exchange_buffers(self) -> ExchangeBufferBytes:
        """Buffers of a token exchange."""
        return ExchangeBufferBytes(self.config, self.batch, self.formats)

    @cached_property
    def parts_memory(self) -> StagePartsMemory:
        """Saved activations and delayed weight gradients of each part of a stage."""
        return StagePartsMemory.from_workspace(self)

    @cached_property
    def saves_expert_input(self) -> bool:
        """True if the experts' input tokens are saved in the compute dtype."""
        return any(
            kept.name == FFN_NORM_OUTPUT and kept.recompute_module not in self.recompute_modules
            for kept in self._attend
        )

    @cached_property
    def _attend(self) -> list[SavedActivation]:
        return attention_activations(self.config, self.batch)

    @cached_property
    def attention_forward(self) -> float:
        """Bytes of `_attend_forward` of an MoE layer."""
        return self._attend_forward(self._attend)

    @cached_property
    def attention_backward(self) -> float:
        """Bytes of `_attend_backward` of an MoE layer."""
        return self._attend_backward(self._attend)

    @cached_property
    def dense_attention_forward(self) -> float:
        """Bytes of `_attend_forward` of a dense layer."""
        return self._attend_forward(dense_layer_activations(self.config, self.batch))

    @cached_property
    def dense_attention_backward(self) -> float:
        """Bytes of `_attend_backward` of a dense layer."""
        return self._attend_backward(dense_layer_activations(self.config, self.batch))

    @cached_property
    def dense_ffn_forward(self) -> float:
        """Bytes of `_feed_forward` of a dense layer."""
        return self._feed_forward(self.batch.tokens, self.config.intermediate_size)

    @cached_property
    def dense_ffn_backward(self) -> float:
        """Bytes of `_feed_forward_backward` of a dense layer."""
        return self._feed_forward_backward(self.batch.tokens, self.config.intermediate_size)

    @cached_property
    def shared_experts_forward(self) -> float:
        """Bytes of `_feed_forward` of the shared experts."""
        return self._feed_forward(self.batch.tokens, self.config.n_shared_experts * self.config.moe_intermediate_size)

    @cached_property
    def shared_experts_backward(self) -> float:
        """Bytes of `_feed_forward_backward` of the shared experts."""
        return self._feed_forward_backward(
            self.batch.tokens, self.config.n_shared_experts * self.config.moe_intermediate_size
        )

    def _attend_forward(self, items: list[SavedActivation]) -> float:
        """Return the workspace of attention's forward."""
        # The peak is at the output projection: the phase still holds all its activations, also those that the policy
        # will recompute.
        dropped = recomputed_bytes(items, self.recompute_modules)
        if self.batch.fp8:  # the wide inputs of Linears, of which only FP8 copies are saved
            heads = self.config.num_attention_heads * self.config.v_head_dim
            latents = (self.config.q_lora_rank or 0) + self.config.kv_lora_rank
            dropped += self.batch.tokens * (self.config.hidden_size + latents + heads) * self.batch.element_bytes
        return (
            dropped
            + self.hidden_state_bytes
            + self._product(self.batch.tokens, self.config.num_attention_heads * self.config.v_head_dim)
        )

    def _attend_backward(self, items: list[SavedActivation]) -> float:
        """Return the workspace of attention's backward."""
        # The peak is at core attention: gradients of queries, keys, values and output; of the residual stream; and of
        # the norm before the feed-forward network.
        model, size = self.config, self.batch.element_bytes
        heads = model.num_attention_heads * (2 * model.qk_head_dim + 2 * model.v_head_dim)
        again = recomputed_bytes(items, self.recompute_modules)
        grads = self.batch.tokens * (heads + 2 * model.hidden_size) * size
        return again + grads + self._product(self.batch.tokens, model.num_attention_heads * model.v_head_dim)

    def _feed_forward(self, rows: float, inner: int, experts: int = 1) -> float:
        """Return the workspace of a feed-forward network's forward, without its result."""
        # Gate, up and SwiGLU are 3 F wide per row; what is saved of them counts as activations.
        kept = 0 if self.batch.fp8 else sum(width for width, part in _INNER if part not in self.recompute_modules)
        return rows * (3 - kept) * inner * self.batch.element_bytes + self._product(rows, 2 * inner, experts)

    def _feed_forward_backward(self, rows: float, inner: int, experts: int = 1) -> float:
        """Return the workspace of a feed-forward network's backward."""
        # The larger of two peaks: at SwiGLU, its gradients (2 F wide), the incoming gradient and two intermediate
        # products (F each), with two FP32 copies; and later the gradients of rows and of SwiGLU.
        again = 3 if self.batch.fp8 else sum(width for width, part in _INNER if part in self.recompute_modules)
        wide = 2 * self.batch.fp32_element_bytes if self.batch.element_bytes < self.batch.fp32_element_bytes else 0
        intermediates = rows * inner * (5 * self.batch.element_bytes + wide)
        grads = max(intermediates, rows * (self.config.hidden_size + inner) * self.batch.element_bytes)
        in_fp8 = max(self._product(rows, 2 * inner, experts), self._quantized(rows, 2 * inner, experts))
        return rows * again * inner * self.batch.element_bytes + grads + in_fp8

    @cached_property
    def routed_experts_forward(self) -> float:
        """Bytes of `_feed_forward` of the routed experts, for all rows or for one block."""
        return self._feed_forward(self._block_rows, self.config.moe_intermediate_size, self.local_experts)

    @cached_property
    def routed_experts_backward(self) -> float:
        """Bytes of `_feed_forward_backward` of the routed experts, for all rows or for one block."""
        block_rows, inner = self._block_rows, self.config.moe_intermediate_size
        backward = self._feed_forward_backward(block_rows, inner, self.local_experts)
        if not self.batch.uses_row_blocks(self.config):
            return backward
        # A block runs its forward again, so it also holds its activations (3 F), its results and their gradients, and
        # its rows except in FP8 (2 or 3 D); and it computes weight gradients now instead of delaying them.
        wide = 2 if self.batch.fp8 else 3
        intermediates = block_rows * (3 * inner + wide * self.config.hidden_size) * self.batch.element_bytes
        return intermediates + max(backward, self.expert_wgrad)

    @property
    def _block_rows(self) -> float:
        rows = self.batch.received_rows(self.config)
        return min(rows, self.batch.expert_block_rows) if self.batch.expert_block_rows is not None else rows

    @cached_property
    def expert_wgrad(self) -> float:
        """Bytes of the weight gradients of all experts' gate and up projections, if GEMMs do not accumulate them."""
        outputs, inputs = 2 * self.config.moe_intermediate_size, self.config.hidden_size
        elements = self.local_experts * outputs * inputs
        if self.batch.fp8:  # computed one expert at a time, then stacked: two copies
            rows = self.batch.received_rows(self.config) / self.local_experts
            return elements * 2 * self.batch.fp32_element_bytes + self._outer(rows, inputs, outputs)
        return (
            elements * (self.batch.element_bytes + self._widened)
            if self.batch.element_bytes < self.batch.fp32_element_bytes
            else 0.0
        )

    def linear_wgrad(self, inputs: int, outputs: int) -> float:
        """Return the bytes of one weight's gradient before it is accumulated."""
        # The `triton` backend accumulates within its FP8 GEMM and needs none; the other backends need this much.
        if self.batch.fp8:
            return inputs * outputs * 2 * self.batch.fp32_element_bytes + self._outer(
                self.batch.tokens, inputs, outputs
            )
        return (
            inputs * outputs * (self.batch.element_bytes + self._widened)
            if self.batch.element_bytes < self.batch.fp32_element_bytes
            else 0
        )

    @cached_property
    def loss_logits(self) -> float:
        """Bytes of the logits of one chunk of tokens, and of its part of the head's weight gradient, if the GEMM does
        not accumulate that. The logits exist in FP32 or wider and in the compute dtype."""
        tokens = min(self.batch.tokens, tokens_per_logit_block(self.config.vocab_size, on_gpu=not self.batch.on_cpu))
        narrow = self.batch.element_bytes if self.batch.element_bytes < self.batch.fp32_element_bytes else 0
        logits = tokens * self.config.vocab_size * (self.batch.fp32_element_bytes + narrow)
        return logits + self.config.vocab_size * self.config.hidden_size * (narrow + self._widened)

    @property
    def _widened(self) -> int:
        """Bytes per number of the widened copy that a CPU makes of a gradient to add it to a wider one; 0 if none."""
        return (
            self.batch.fp32_element_bytes
            if self.batch.on_cpu and self.batch.element_bytes < self.batch.fp32_element_bytes
            else 0
        )

    def _outer(self, rows: float, inputs: int, outputs: int) -> float:
        """Return the reference backend's workspace for one weight gradient: FP64 operands and one tile's sum."""
        if not self.batch.on_cpu:
            return 0.0
        return TILE_WIDTH * ceil(rows / TILE_WIDTH) * (inputs + outputs) * _FP64 + inputs * outputs * (
            _FP64 + self.batch.fp32_element_bytes
        )

    @cached_property
    def embedding_wgrad(self) -> float:
        """Bytes of the embedding's gradient rows, one per token, and of a copy if the gradient's dtype is wider."""
        copies = 2 if self.batch.element_bytes < self.batch.fp32_element_bytes else 1
        return copies * self.batch.tokens * self.config.hidden_size * self.batch.fp32_element_bytes

    def _product(self, rows: float, outputs: int, experts: int = 1) -> float:
        """Return the reference backend's workspace for one FP8 product: FP64 operands and intermediate sums."""
        # One expert at a time; the results are concatenated, which holds them twice.
        if not (self.batch.fp8 and self.batch.on_cpu):
            return 0.0
        one, hidden = rows / experts, self.config.hidden_size
        joined = 2 * rows * outputs * self.batch.element_bytes if experts > 1 else 0.0
        return one * hidden * _FP64 + outputs * hidden * _FP64 + one * outputs * 2 * _FP64 + joined

    def _quantized(self, rows: float, width: int, experts: int) -> float:
        """Return the reference backend's workspace for column-wise quantization."""
        # Three FP32 copies of the rows, padded to whole tiles: padded, transposed, and divided by their scales.
        if not (self.batch.fp8 and self.batch.on_cpu):
            return 0.0
        return 3 * experts * TILE_WIDTH * ceil(rows / experts / TILE_WIDTH) * width * self.batch.fp32_element_bytes


_INNER = ((2, RecomputeModule.GATE_UP), (1, RecomputeModule.SWIGLU))
"""Widths, in F, of a feed-forward network's inner activations, and the module that recomputes each."""


@dataclass(frozen=True)
class PartMemory:
    """Memory of one part of a stage, in bytes."""

    saved_bytes: float
    """Activations that its forward saves."""
    deferred_bytes: float
    """Inputs of delayed weight gradients, held from I to W."""
    wgrad_bytes: float
    """Largest weight gradient before it is accumulated."""


@dataclass(frozen=True)
class StagePartsMemory:
    """Memory of each part of a stage. A layer's input, which is another part's output, is in none of them."""

    attention: PartMemory
    shared_experts: PartMemory
    routed_experts: PartMemory
    """Routed experts with the routing tables."""
    dense_layer: PartMemory
    """Whole dense layer."""
    embedding: PartMemory
    final_norm: PartMemory
    """Norm after the last layer, with that layer's output."""
    loss: PartMemory
    mtp_merge: PartMemory
    """Merge of hidden state and embedding in an MTP module."""

    @staticmethod
    def from_workspace(working: WorkspaceBytes) -> StagePartsMemory:
        """Compute the parts' memory from the shapes of `working`."""
        config, batch, hidden = working.config, working.batch, working.hidden_state_bytes
        first, network, experts = _gradients(config, batch, working.local_experts, dense=False)
        dense_first, dense_network, _ = _gradients(config, batch, working.local_experts, dense=True)

        def part(items: list[SavedActivation], gradients: float = 0.0, product: float = 0.0) -> PartMemory:
            items = [kept for kept in items if kept.name != LAYER_INPUT]
            return PartMemory(
                saved_bytes(items, working.recompute_modules), wgrad_input_bytes(items) + gradients, product
            )

        heads = config.num_attention_heads * max(config.qk_head_dim, config.qk_nope_head_dim + config.v_head_dim)
        attention = working.linear_wgrad(max(config.q_lora_rank or config.hidden_size, config.kv_lora_rank), heads)
        inner = working.linear_wgrad(config.hidden_size, 2 * config.intermediate_size)
        both = working.linear_wgrad(config.hidden_size, 2 * config.n_shared_experts * config.moe_intermediate_size)
        rows = [*routed_expert_activations(config, batch), routing_table_memory(config, batch)]
        return StagePartsMemory(
            attention=part(attention_activations(config, batch), first, attention),
            shared_experts=part(shared_expert_activations(config, batch), network, both),
            routed_experts=part(rows, experts, working.expert_wgrad),
            dense_layer=part(
                dense_layer_activations(config, batch), dense_first + dense_network, max(attention, inner)
            ),
            embedding=PartMemory(0.0, hidden, working.embedding_wgrad),
            final_norm=part(final_norm_activations(config, batch)),
            loss=part(loss_activations(config, batch)),
            mtp_merge=part(mtp_merge_activations(config, batch), 2 * hidden, working.embedding_wgrad),
        )


def _gradients(
    config: ModelConfig, batch: MicroBatchShape, local_experts: int, *, dense: bool
) -> tuple[float, float, float]:
    """Return the bytes of output gradients that delayed weight gradients need.

    Three figures: attention; shared experts, or the dense layer's network; and routed experts.
    """
    tokens, rows = batch.tokens, batch.received_rows(config)
    heads, query_rank = config.num_attention_heads, config.q_lora_rank
    widths = [heads * config.qk_head_dim, config.kv_lora_rank + config.qk_rope_head_dim]
    widths += [heads * (config.qk_nope_head_dim + config.v_head_dim), config.hidden_size]
    widths += [] if query_rank is None else [query_rank]
    router = 0.0 if dense else tokens * config.n_routed_experts * batch.fp32_element_bytes
    inner = config.intermediate_size if dense else config.n_shared_experts * config.moe_intermediate_size
    both = [2 * inner, config.hidden_size] if inner else []
    expert = [2 * config.moe_intermediate_size, config.hidden_size]
    if batch.fp8:  # the recomputed SwiGLU output is an operand too, so it is held with them
        attended = sum(columnwise_fp8_bytes(tokens, width) for width in widths)
        network = sum(columnwise_fp8_bytes(tokens, width) for width in (*both, *([inner] if inner else [])))
        experts = sum(
            columnwise_fp8_bytes(rows, width, local_experts) for width in (*expert, config.moe_intermediate_size)
        )
    else:
        attended, network, experts = (
            count * sum(each) * batch.element_bytes
            for count, each in ((tokens, widths), (tokens, both), (rows, expert))
        )
    # Row blocks compute their experts' weight gradients in the backward of inputs, and hold nothing.
    return attended + router, network, 0.0 if batch.uses_row_blocks(config) else experts
