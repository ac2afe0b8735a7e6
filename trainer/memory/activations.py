"""Bytes that the forward of a stage's parts keeps for its backward, from the shapes, under any policy of recomputing.

What keeps what is read off `trainer/model/` and `trainer/precision/fp8.py`; tests compare it with what is allocated.

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
_SCALE = 4  # of an FP8 tile
_E5M6 = 1.5


@dataclass(frozen=True)
class SavedActivation:
    """One thing that is kept."""

    name: str
    nbytes: float
    recompute_module: RecomputeModule | None = None
    """The policy that makes it again instead; None where there is none."""
    needed_for_wgrad: bool = False
    """Whether a gradient of weights takes it: between I and W it stays, or what has been made again does."""
    recompute_source_of: RecomputeModule | None = None
    """It is kept under this policy alone, which makes something again from it."""


@dataclass(frozen=True)
class MicroBatchShape:
    """What goes through a layer at once on one rank."""

    sequences: int
    sequence_length: int
    """Tokens of a sequence."""
    dtype: torch.dtype
    """What the layers compute in."""
    on_cpu: bool
    """Where attention keeps its probabilities up to a length, instead of one number a query and head."""
    expert_rows_override: float | None = None
    """That the experts of this rank receive; None for the average over ranks, top-k a token."""
    fp8: bool = False
    """Whether Linears compute in FP8 and keep what they keep in it."""
    expert_block_rows: int | None = None
    """More rows than this are computed in blocks of so many: see `model.n_routed_experts`."""

    @property
    def tokens(self) -> int:
        """T."""
        return self.sequences * self.sequence_length

    @property
    def element_bytes(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    @property
    def fp32_element_bytes(self) -> int:
        """Bytes of a number of what is FP32 at least: gates, affinities, sums over a row, gradients of weights."""
        return torch.promote_types(self.dtype, torch.float32).itemsize

    def received_rows(self, config: ModelConfig) -> float:
        """R, rows for the experts of this rank."""
        return (
            self.tokens * config.num_experts_per_tok if self.expert_rows_override is None else self.expert_rows_override
        )

    def uses_row_blocks(self, config: ModelConfig) -> bool:
        """Whether these are too many rows to compute at once."""
        return self.expert_block_rows is not None and self.received_rows(config) > self.expert_block_rows


def dense_layer_activations(config: ModelConfig, batch: MicroBatchShape) -> list[SavedActivation]:
    """Everything that a dense layer could keep."""
    return [
        *_attention(config, batch),
        *_feed_forward("dense", batch.tokens, config.intermediate_size, config, batch),
    ]


def moe_layer_activations(config: ModelConfig, batch: MicroBatchShape) -> list[SavedActivation]:
    """Everything that a layer with routed experts could keep, with the routing tables of the `flat` exchange."""
    return [
        *attention_activations(config, batch),
        *shared_expert_activations(config, batch),
        *routed_expert_activations(config, batch),
        routing_table_memory(config, batch),
    ]


def attention_activations(config: ModelConfig, batch: MicroBatchShape) -> list[SavedActivation]:
    """What the first phase of a routed layer could keep, up to the router. The layer's input comes first."""
    return [*_attention(config, batch), *_router(config, batch)]


def shared_expert_activations(config: ModelConfig, batch: MicroBatchShape) -> list[SavedActivation]:
    """What the shared experts could keep; their input is among the first phase's where it is kept as it is."""
    inner = config.n_shared_experts * config.moe_intermediate_size
    items = _feed_forward("shared experts", batch.tokens, inner, config, batch) if inner else ()
    return [kept for kept in items if kept.name != FFN_NORM_OUTPUT]


def routed_expert_activations(config: ModelConfig, batch: MicroBatchShape) -> list[SavedActivation]:
    """What the routed experts of this rank could keep. In blocks, nothing but what they have received."""
    rows, in_blocks = batch.received_rows(config), batch.uses_row_blocks(config)
    came = rowwise_fp8_bytes(rows, config.hidden_size) if batch.fp8 else rows * config.hidden_size * batch.element_bytes
    items = [
        SavedActivation("rows that came", came, needed_for_wgrad=not in_blocks),
        SavedActivation("their gate weights", rows * batch.fp32_element_bytes),
    ]
    return items if in_blocks else [*items, *_inner("routed experts", rows, config.moe_intermediate_size, batch)]


def routing_table_memory(config: ModelConfig, batch: MicroBatchShape) -> SavedActivation:
    """Where tokens went, and the way back."""
    rows = batch.received_rows(config)
    return SavedActivation("routing tables", _INDEX * (batch.tokens * (3 * config.num_experts_per_tok + 1) + 3 * rows))


def final_norm_activations(config: ModelConfig, batch: MicroBatchShape) -> list[SavedActivation]:
    """What a norm behind the last layer keeps: the layer's output."""
    return [
        SavedActivation("input of the final norm", batch.tokens * config.hidden_size * batch.element_bytes),
        SavedActivation("a number a token", batch.tokens * batch.fp32_element_bytes),
    ]


def loss_activations(config: ModelConfig, batch: MicroBatchShape) -> list[SavedActivation]:
    """What one loss keeps: a gradient that is formed with it. That of the head goes where it belongs at once."""
    return [SavedActivation("gradient of the head's input", batch.tokens * config.hidden_size * batch.element_bytes)]


def mtp_merge_activations(config: ModelConfig, batch: MicroBatchShape) -> list[SavedActivation]:
    """What an MTP module could keep of joining hidden state and embedding."""
    tokens, width = batch.tokens, config.hidden_size
    normed = tokens * 2 * width * batch.element_bytes
    return [
        SavedActivation("hidden state and embedding", normed),
        SavedActivation("a number a token of each", 2 * tokens * batch.fp32_element_bytes),
        SavedActivation(
            "tiles of their norms", rowwise_fp8_bytes(tokens, 2 * width), RecomputeModule.NORM, needed_for_wgrad=True
        )
        if batch.fp8
        else SavedActivation("their norms", normed, RecomputeModule.NORM, needed_for_wgrad=True),
    ]


def saved_bytes(items: Iterable[SavedActivation], policy: Collection[RecomputeModule] = ()) -> float:
    """What is left of it under a policy."""
    return sum(kept.nbytes for kept in items if _is_kept(kept, policy))


def wgrad_input_bytes(items: Iterable[SavedActivation]) -> float:
    """What of it stays from I to W, whatever the policy."""
    return sum(kept.nbytes for kept in items if kept.needed_for_wgrad)


def recomputed_bytes(items: Iterable[SavedActivation], policy: Collection[RecomputeModule] = ()) -> float:
    """What a backward under a policy makes again of it."""
    return sum(kept.nbytes for kept in items if kept.recompute_module in policy and kept.recompute_source_of is None)


def rowwise_fp8_bytes(rows: float, width: int) -> float:
    """FP8 numbers with a scale for each 1 × 128."""
    return rows * (width + _SCALE * tiles_per_row(width))


def columnwise_fp8_bytes(rows: float, width: int, experts: int = 1) -> float:
    """FP8 numbers with a scale for each 128 × 1; those of each expert are filled up to whole tiles."""
    tiles = experts * ceil(rows / experts / TILE_WIDTH)
    return tiles * width * (TILE_WIDTH + _SCALE)


def _is_kept(kept: SavedActivation, policy: Collection[RecomputeModule]) -> bool:
    return kept.recompute_module not in policy and (
        kept.recompute_source_of is None or kept.recompute_source_of in policy
    )


LAYER_INPUT = "input"
FFN_NORM_OUTPUT = "norm before the feed-forward network"


def _attention(config: ModelConfig, batch: MicroBatchShape) -> Iterator[SavedActivation]:
    """Up to the residual stream behind it."""

    def numbers(what: str, a_token: int, part: RecomputeModule | None = None, **more: object) -> SavedActivation:
        return SavedActivation(what, batch.tokens * a_token * batch.element_bytes, part, **more)  # type: ignore[arg-type]

    heads, query_rank, rank = config.num_attention_heads, config.q_lora_rank or 0, config.kv_lora_rank
    of_a_head = (
        2 * config.qk_head_dim + config.qk_nope_head_dim + config.v_head_dim
    )  # values hold unrotated keys' memory
    given = heads * config.v_head_dim
    yield numbers(LAYER_INPUT, config.hidden_size)
    if batch.fp8:
        yield from _attention_tiles(config, batch)
        whole = query_rank + rank + (config.hidden_size if config.q_lora_rank is None else 0)
        yield numbers("norms", whole, RecomputeModule.NORM, recompute_source_of=RecomputeModule.UP_PROJECTION)
    else:
        yield numbers("norm before attention", config.hidden_size, RecomputeModule.NORM, needed_for_wgrad=True)
        yield numbers("their norms", query_rank + rank, RecomputeModule.NORM, needed_for_wgrad=True)
    yield numbers("compressed queries, keys and values", query_rank + rank + config.qk_rope_head_dim)
    yield numbers("queries, keys and values", heads * of_a_head, RecomputeModule.UP_PROJECTION)
    if batch.on_cpu:
        elements = batch.sequences * heads * saved_probability_count(batch.sequence_length)
        yield SavedActivation("probabilities", elements * batch.element_bytes, RecomputeModule.ATTENTION)
    else:
        yield SavedActivation(
            "log of the sum of each softmax", batch.tokens * heads * batch.fp32_element_bytes, RecomputeModule.ATTENTION
        )
    if not batch.fp8:
        yield numbers("what attention gives", given, RecomputeModule.ATTENTION, needed_for_wgrad=True)
    yield numbers("residual", config.hidden_size)
    norms = 3 if config.q_lora_rank is None else 4
    yield SavedActivation("a number a token of each norm", batch.tokens * norms * batch.fp32_element_bytes)


def _attention_tiles(config: ModelConfig, batch: MicroBatchShape) -> Iterator[SavedActivation]:
    """What Linears keep in FP8 of their inputs: each its own, also of the same input."""
    widths = [config.hidden_size, config.hidden_size, config.kv_lora_rank]
    widths += [] if config.q_lora_rank is None else [config.q_lora_rank]
    tiles = sum(rowwise_fp8_bytes(batch.tokens, width) for width in widths)
    yield SavedActivation("tiles of norms", tiles, RecomputeModule.NORM, needed_for_wgrad=True)
    given = config.num_attention_heads * config.v_head_dim
    packed = batch.tokens * (_E5M6 * (given + given % 2) + tiles_per_row(given))
    yield SavedActivation("E5M6 of what attention gives", packed, needed_for_wgrad=True)


def _router(config: ModelConfig, batch: MicroBatchShape) -> Iterator[SavedActivation]:
    normed = batch.tokens * config.hidden_size
    narrow = batch.fp32_element_bytes > batch.element_bytes
    if not narrow or (config.n_shared_experts and not batch.fp8):  # the routed ones have copies of their own
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
    sums = 1 + (
        config.num_experts_per_tok + 1 if config.norm_topk_prob else 0
    )  # of the balance loss; gates and their sum
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
    if batch.fp8:  # SwiGLU is always made again from these
        yield SavedActivation(f"{whose}: tiles of gate and up projections", rowwise_fp8_bytes(rows, 2 * inner))
        return
    yield SavedActivation(
        f"{whose}: gate and up projections", rows * 2 * inner * batch.element_bytes, RecomputeModule.GATE_UP
    )
    yield SavedActivation(
        f"{whose}: SwiGLU", rows * inner * batch.element_bytes, RecomputeModule.SWIGLU, needed_for_wgrad=True
    )
