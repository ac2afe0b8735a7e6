"""Bytes of saved activations of a stage's parts, from the shapes, under any recompute policy.

The items follow the code of `trainer/model/` and `trainer/precision/fp8.py`; tests compare them with allocated memory.

Letters: D hidden, F inner width of an expert.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from math import ceil

import torch

from ...comm.fp8 import TILE_WIDTH, tiles_per_row
from ..model.config import ModelConfig
from ..model.cpu_attention import saved_probability_count
from ..model.recompute import RecomputeModule

_INDEX = 8  # bytes of an int64
_SCALE = 4  # bytes of the FP32 scale of an FP8 tile
_E5M6 = 1.5  # bytes: two numbers share three


@dataclass(frozen=True)
class SavedActivation:
    """Tensor, or group of tensors, that a forward saves for its backward."""

    name: str
    nbytes: float
    recompute_module: RecomputeModule | None = None
    """Recompute module under which it is recomputed instead of saved; None: it is always saved."""
    needed_for_wgrad: bool = False
    """True if a weight gradient needs it: it, or its recomputed copy, is held between I and W."""
    recompute_source_of: RecomputeModule | None = None
    """Recompute module whose recomputation needs it as input: it is saved only under that module."""


@dataclass(frozen=True)
class MicroBatchShape:
    """Shape and formats of one micro-batch on one rank."""

    sequences: int
    sequence_length: int
    """Tokens per sequence."""
    dtype: torch.dtype
    """Dtype of activations."""
    on_cpu: bool
    """True on a CPU, where attention saves probabilities of short sequences, not one number per query and head."""
    expert_rows_override: float | None = None
    """Rows that the experts of this rank receive; None: the average over ranks, top-k per token."""
    fp8: bool = False
    """True if Linears compute in FP8 and save their inputs in it."""
    expert_block_rows: int | None = None
    """Largest number of rows that the experts compute in one call; see `model.experts`. None: no limit."""

    @property
    def tokens(self) -> int:
        """T, tokens of the micro-batch."""
        return self.sequences * self.sequence_length

    @property
    def element_bytes(self) -> int:
        """Bytes per number in the compute dtype."""
        return self.dtype.itemsize

    @property
    def fp32_element_bytes(self) -> int:
        """Bytes per number of tensors that are FP32 or wider: gates, affinities, row sums, weight gradients."""
        return torch.promote_types(self.dtype, torch.float32).itemsize

    def received_rows(self, config: ModelConfig) -> float:
        """Return R, the rows that the experts of this rank receive."""
        return (
            self.tokens * config.num_experts_per_tok if self.expert_rows_override is None else self.expert_rows_override
        )

    def uses_row_blocks(self, config: ModelConfig) -> bool:
        """Return True if the experts compute their rows in blocks."""
        return self.expert_block_rows is not None and self.received_rows(config) > self.expert_block_rows


def dense_layer_activations(config: ModelConfig, batch: MicroBatchShape) -> list[SavedActivation]:
    """Return everything that a dense layer may save."""
    return [
        *_attention(config, batch),
        *_feed_forward("dense", batch.tokens, config.intermediate_size, config, batch),
    ]


def moe_layer_activations(config: ModelConfig, batch: MicroBatchShape) -> list[SavedActivation]:
    """Return everything that a layer with routed experts may save, with the routing tables of the `flat` exchange."""
    return [
        *attention_activations(config, batch),
        *shared_expert_activations(config, batch),
        *routed_expert_activations(config, batch),
        routing_table_memory(config, batch),
    ]


def attention_activations(config: ModelConfig, batch: MicroBatchShape) -> list[SavedActivation]:
    """Return what the first phase of an MoE layer may save, up to the router; the layer's input comes first."""
    return [*_attention(config, batch), *_router(config, batch)]


def shared_expert_activations(config: ModelConfig, batch: MicroBatchShape) -> list[SavedActivation]:
    """Return what the shared experts may save, without their input, which the first phase saves."""
    inner = config.n_shared_experts * config.moe_intermediate_size
    items = _feed_forward("shared experts", batch.tokens, inner, config, batch) if inner else ()
    return [kept for kept in items if kept.name != FFN_NORM_OUTPUT]


def routed_expert_activations(config: ModelConfig, batch: MicroBatchShape) -> list[SavedActivation]:
    """Return what the routed experts of this rank may save; in row blocks, only what they receive."""
    rows, in_blocks = batch.received_rows(config), batch.uses_row_blocks(config)
    received = (
        rowwise_fp8_bytes(rows, config.hidden_size) if batch.fp8 else rows * config.hidden_size * batch.element_bytes
    )
    items = [
        # Row blocks compute their weight gradients in I, so the rows are not held for W.
        SavedActivation("received rows", received, needed_for_wgrad=not in_blocks),
        SavedActivation("their gate weights", rows * batch.fp32_element_bytes),
    ]
    return items if in_blocks else [*items, *_inner("routed experts", rows, config.moe_intermediate_size, batch)]


def routing_table_memory(config: ModelConfig, batch: MicroBatchShape) -> SavedActivation:
    """Return the routing tables: indices of rows sent and received, and their inverses."""
    rows = batch.received_rows(config)
    # int64: 3 K + 1 numbers per token and 3 per received row.
    return SavedActivation("routing tables", _INDEX * (batch.tokens * (3 * config.num_experts_per_tok + 1) + 3 * rows))


def final_norm_activations(config: ModelConfig, batch: MicroBatchShape) -> list[SavedActivation]:
    """Return what the norm after the last layer saves: that layer's output and one number per token."""
    return [
        SavedActivation("input of the final norm", batch.tokens * config.hidden_size * batch.element_bytes),
        SavedActivation("one number per token", batch.tokens * batch.fp32_element_bytes),
    ]


def loss_activations(config: ModelConfig, batch: MicroBatchShape) -> list[SavedActivation]:
    """Return what one loss saves: the gradient of its input, which its forward computes."""
    # The head's weight gradient is added to the weight's `.grad` in the forward, and so is not saved.
    return [SavedActivation("gradient of the head's input", batch.tokens * config.hidden_size * batch.element_bytes)]


def mtp_merge_activations(config: ModelConfig, batch: MicroBatchShape) -> list[SavedActivation]:
    """Return what an MTP module may save of merging hidden state and embedding."""
    tokens, width = batch.tokens, config.hidden_size
    normed = tokens * 2 * width * batch.element_bytes
    return [
        SavedActivation("hidden state and embedding", normed),
        SavedActivation("one number per token of each", 2 * tokens * batch.fp32_element_bytes),
        SavedActivation(
            "tiles of their norms", rowwise_fp8_bytes(tokens, 2 * width), RecomputeModule.NORM, needed_for_wgrad=True
        )
        if batch.fp8
        else SavedActivation("their norms", normed, RecomputeModule.NORM, needed_for_wgrad=True),
    ]


def saved_bytes(items: Iterable[SavedActivation], policy: Collection[RecomputeModule] = ()) -> float:
    """Return the bytes of `items` that are saved under `policy`."""
    return sum(kept.nbytes for kept in items if _is_kept(kept, policy))


def wgrad_input_bytes(items: Iterable[SavedActivation]) -> float:
    """Return the bytes of `items` that are held from I to W, under any policy."""
    return sum(kept.nbytes for kept in items if kept.needed_for_wgrad)


def recomputed_bytes(items: Iterable[SavedActivation], policy: Collection[RecomputeModule] = ()) -> float:
    """Return the bytes of `items` that a backward recomputes under `policy`."""
    return sum(kept.nbytes for kept in items if kept.recompute_module in policy and kept.recompute_source_of is None)


def rowwise_fp8_bytes(rows: float, width: int) -> float:
    """Return the bytes of FP8 numbers with a scale for each 1 × 128."""
    return rows * (width + _SCALE * tiles_per_row(width))


def columnwise_fp8_bytes(rows: float, width: int, experts: int = 1) -> float:
    """Return the bytes of FP8 numbers with a scale for each 128 × 1; each expert's rows are padded to whole tiles."""
    tiles = experts * ceil(rows / experts / TILE_WIDTH)
    return tiles * width * (TILE_WIDTH + _SCALE)


def _is_kept(kept: SavedActivation, policy: Collection[RecomputeModule]) -> bool:
    return kept.recompute_module not in policy and (
        kept.recompute_source_of is None or kept.recompute_source_of in policy
    )


LAYER_INPUT = "input"
FFN_NORM_OUTPUT = "norm before the feed-forward network"


def _attention(config: ModelConfig, batch: MicroBatchShape) -> Iterator[SavedActivation]:
    """Yield what attention may save, from the layer's input to the residual stream after it."""

    def numbers(name: str, per_token: int, part: RecomputeModule | None = None, **more: object) -> SavedActivation:
        return SavedActivation(name, batch.tokens * per_token * batch.element_bytes, part, **more)  # type: ignore[arg-type]

    heads, query_rank, rank = config.num_attention_heads, config.q_lora_rank or 0, config.kv_lora_rank
    # Queries, keys, and the up-projection of keys and values: values are views of it, so they hold the memory of the
    # unrotated keys too.
    width_per_head = 2 * config.qk_head_dim + config.qk_nope_head_dim + config.v_head_dim
    attention_width = heads * config.v_head_dim
    yield numbers(LAYER_INPUT, config.hidden_size)
    if batch.fp8:
        yield from _attention_tiles(config, batch)
        # Linears save FP8 copies, so the wide norms are saved only as inputs of a recomputed up-projection.
        whole = query_rank + rank + (config.hidden_size if config.q_lora_rank is None else 0)
        yield numbers("norms", whole, RecomputeModule.NORM, recompute_source_of=RecomputeModule.UP_PROJECTION)
    else:
        yield numbers("norm before attention", config.hidden_size, RecomputeModule.NORM, needed_for_wgrad=True)
        yield numbers("their norms", query_rank + rank, RecomputeModule.NORM, needed_for_wgrad=True)
    yield numbers("compressed queries, keys and values", query_rank + rank + config.qk_rope_head_dim)
    yield numbers("queries, keys and values", heads * width_per_head, RecomputeModule.UP_PROJECTION)
    if batch.on_cpu:
        elements = batch.sequences * heads * saved_probability_count(batch.sequence_length)
        yield SavedActivation("probabilities", elements * batch.element_bytes, RecomputeModule.ATTENTION)
    else:
        # A fused kernel recomputes the probabilities from one number per query and head.
        yield SavedActivation(
            "log of the sum of each softmax", batch.tokens * heads * batch.fp32_element_bytes, RecomputeModule.ATTENTION
        )
    if not batch.fp8:
        yield numbers("attention output", attention_width, RecomputeModule.ATTENTION, needed_for_wgrad=True)
    yield numbers("residual", config.hidden_size)
    # RMSNorm saves one number per row: before attention, before the feed-forward network, and on compressed vectors.
    norms = 3 if config.q_lora_rank is None else 4
    yield SavedActivation("one number per token of each norm", batch.tokens * norms * batch.fp32_element_bytes)


def _attention_tiles(config: ModelConfig, batch: MicroBatchShape) -> Iterator[SavedActivation]:
    """Yield the FP8 inputs that attention's Linears save; Linears with the same input save one copy each."""
    widths = [config.hidden_size, config.hidden_size, config.kv_lora_rank]
    widths += [] if config.q_lora_rank is None else [config.q_lora_rank]
    tiles = sum(rowwise_fp8_bytes(batch.tokens, width) for width in widths)
    yield SavedActivation("tiles of norms", tiles, RecomputeModule.NORM, needed_for_wgrad=True)
    width = config.num_attention_heads * config.v_head_dim
    packed = batch.tokens * (_E5M6 * (width + width % 2) + tiles_per_row(width))
    yield SavedActivation("attention output in E5M6", packed, needed_for_wgrad=True)


def _router(config: ModelConfig, batch: MicroBatchShape) -> Iterator[SavedActivation]:
    normed = batch.tokens * config.hidden_size
    narrow = batch.fp32_element_bytes > batch.element_bytes
    # The router saves the norm's output in FP32. The same tensor in the compute dtype is saved for the shared experts
    # only: routed experts save their received rows, and FP8 Linears their FP8 inputs.
    if not narrow or (config.n_shared_experts and not batch.fp8):
        yield SavedActivation(
            FFN_NORM_OUTPUT, normed * batch.element_bytes, RecomputeModule.NORM, needed_for_wgrad=True
        )
    if narrow:
        yield SavedActivation(
            "the same for the router, in FP32",
            normed * batch.fp32_element_bytes,
            RecomputeModule.NORM,
            needed_for_wgrad=True,
        )
    yield SavedActivation("affinities", batch.tokens * config.n_routed_experts * batch.fp32_element_bytes)
    yield SavedActivation("choices", batch.tokens * config.num_experts_per_tok * _INDEX)
    # The affinities' sum for the balance loss, and with normalization the K gates and their sum.
    sums = 1 + (config.num_experts_per_tok + 1 if config.norm_topk_prob else 0)
    yield SavedActivation("gates and sums", batch.tokens * sums * batch.fp32_element_bytes)
    yield SavedActivation(
        "load of each sequence", batch.sequences * (config.n_routed_experts + 1) * batch.fp32_element_bytes
    )


def _feed_forward(
    whose: str, rows: float, inner: int, config: ModelConfig, batch: MicroBatchShape
) -> Iterator[SavedActivation]:
    if batch.fp8:
        yield SavedActivation(
            f"{whose}: tiles of their input",
            rowwise_fp8_bytes(rows, config.hidden_size),
            RecomputeModule.NORM,
            needed_for_wgrad=True,
        )
    else:
        yield SavedActivation(
            FFN_NORM_OUTPUT,
            rows * config.hidden_size * batch.element_bytes,
            RecomputeModule.NORM,
            needed_for_wgrad=True,
        )
    yield from _inner(whose, rows, inner, batch)


def _inner(whose: str, rows: float, inner: int, batch: MicroBatchShape) -> Iterator[SavedActivation]:
    if batch.fp8:  # these are always saved, and SwiGLU is always recomputed from them
        yield SavedActivation(f"{whose}: tiles of gate and up projections", rowwise_fp8_bytes(rows, 2 * inner))
        return
    yield SavedActivation(
        f"{whose}: gate and up projections", rows * 2 * inner * batch.element_bytes, RecomputeModule.GATE_UP
    )
    yield SavedActivation(
        f"{whose}: SwiGLU", rows * inner * batch.element_bytes, RecomputeModule.SWIGLU, needed_for_wgrad=True
    )
