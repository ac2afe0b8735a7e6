"""Bytes that the forward of a stage's parts keeps for its backward, from the shapes, under any policy of recomputing.

What keeps what is read off `trainer/model/` and `trainer/precision/fp8.py`; tests compare it with what is allocated.

Letters: D hidden, F inner width of an expert.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from math import ceil

import torch

from ...comm.fp8 import TILE, tiles_of
from ..model.causal import kept_probabilities
from ..model.config import ModelConfig
from ..model.recompute import RecomputeModule

_INDEX = 8  # bytes of an int64
_SCALE = 4  # of an FP8 tile
_E5M6 = 1.5


@dataclass(frozen=True)
class Kept:
    """One thing that is kept."""

    what: str
    bytes: float
    part: RecomputeModule | None = None
    """The policy that makes it again instead; None where there is none."""
    for_weights: bool = False
    """Whether a gradient of weights takes it: between I and W it stays, or what has been made again does."""
    source_of: RecomputeModule | None = None
    """It is kept under this policy alone, which makes something again from it."""


@dataclass(frozen=True)
class MicroBatch:
    """What goes through a layer at once on one rank."""

    sequences: int
    length: int
    """Tokens of a sequence."""
    dtype: torch.dtype
    """What the layers compute in."""
    on_cpu: bool
    """Where attention keeps its probabilities up to a length, instead of one number a query and head."""
    rows: float | None = None
    """That the experts of this rank receive; None for the average over ranks, top-k a token."""
    fp8: bool = False
    """Whether Linears compute in FP8 and keep what they keep in it."""
    block: int | None = None
    """More rows than this are computed in blocks of so many: see `model.n_routed_experts`."""

    @property
    def tokens(self) -> int:
        """T."""
        return self.sequences * self.length

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    @property
    def wide(self) -> int:
        """Bytes of a number of what is FP32 at least: gates, affinities, sums over a row, gradients of weights."""
        return torch.promote_types(self.dtype, torch.float32).itemsize

    def received(self, config: ModelConfig) -> float:
        """R, rows for the experts of this rank."""
        return self.tokens * config.num_experts_per_tok if self.rows is None else self.rows

    def in_blocks(self, config: ModelConfig) -> bool:
        """Whether these are too many rows to compute at once."""
        return self.block is not None and self.received(config) > self.block


def dense_layer(config: ModelConfig, batch: MicroBatch) -> list[Kept]:
    """Everything that a dense layer could keep."""
    return [
        *_attention(config, batch),
        *_feed_forward("dense", batch.tokens, config.intermediate_size, config, batch),
    ]


def moe_layer(config: ModelConfig, batch: MicroBatch) -> list[Kept]:
    """Everything that a layer with routed experts could keep, with the routing tables of the `flat` exchange."""
    return [*attend(config, batch), *shared(config, batch), *routed(config, batch), tables(config, batch)]


def attend(config: ModelConfig, batch: MicroBatch) -> list[Kept]:
    """What the first phase of a routed layer could keep, up to the router. The layer's input comes first."""
    return [*_attention(config, batch), *_router(config, batch)]


def shared(config: ModelConfig, batch: MicroBatch) -> list[Kept]:
    """What the shared experts could keep; their input is among the first phase's where it is kept as it is."""
    inner = config.n_shared_experts * config.moe_intermediate_size
    items = _feed_forward("shared experts", batch.tokens, inner, config, batch) if inner else ()
    return [kept for kept in items if kept.what != NORMED]


def routed(config: ModelConfig, batch: MicroBatch) -> list[Kept]:
    """What the routed experts of this rank could keep. In blocks, nothing but what they have received."""
    rows, in_blocks = batch.received(config), batch.in_blocks(config)
    came = tiles_bytes(rows, config.hidden_size) if batch.fp8 else rows * config.hidden_size * batch.size
    items = [
        Kept("rows that came", came, for_weights=not in_blocks),
        Kept("their gate weights", rows * batch.wide),
    ]
    return items if in_blocks else [*items, *_inner("routed experts", rows, config.moe_intermediate_size, batch)]


def tables(config: ModelConfig, batch: MicroBatch) -> Kept:
    """Where tokens went, and the way back."""
    rows = batch.received(config)
    return Kept("routing tables", _INDEX * (batch.tokens * (3 * config.num_experts_per_tok + 1) + 3 * rows))


def final_norm(config: ModelConfig, batch: MicroBatch) -> list[Kept]:
    """What a norm behind the last layer keeps: the layer's output."""
    return [
        Kept("input of the final norm", batch.tokens * config.hidden_size * batch.size),
        Kept("a number a token", batch.tokens * batch.wide),
    ]


def loss(config: ModelConfig, batch: MicroBatch) -> list[Kept]:
    """What one loss keeps: a gradient that is formed with it. That of the head goes where it belongs at once."""
    return [Kept("gradient of the head's input", batch.tokens * config.hidden_size * batch.size)]


def merge(config: ModelConfig, batch: MicroBatch) -> list[Kept]:
    """What an MTP module could keep of joining hidden state and embedding."""
    tokens, width = batch.tokens, config.hidden_size
    normed = tokens * 2 * width * batch.size
    return [
        Kept("hidden state and embedding", normed),
        Kept("a number a token of each", 2 * tokens * batch.wide),
        Kept("tiles of their norms", tiles_bytes(tokens, 2 * width), RecomputeModule.NORM, for_weights=True)
        if batch.fp8
        else Kept("their norms", normed, RecomputeModule.NORM, for_weights=True),
    ]


def kept_bytes(items: Iterable[Kept], policy: Collection[RecomputeModule] = ()) -> float:
    """What is left of it under a policy."""
    return sum(kept.bytes for kept in items if _is_kept(kept, policy))


def waiting_bytes(items: Iterable[Kept]) -> float:
    """What of it stays from I to W, whatever the policy."""
    return sum(kept.bytes for kept in items if kept.for_weights)


def made_bytes(items: Iterable[Kept], policy: Collection[RecomputeModule] = ()) -> float:
    """What a backward under a policy makes again of it."""
    return sum(kept.bytes for kept in items if kept.part in policy and kept.source_of is None)


def tiles_bytes(rows: float, width: int) -> float:
    """FP8 numbers with a scale for each 1 × 128."""
    return rows * (width + _SCALE * tiles_of(width))


def columns_bytes(rows: float, width: int, experts: int = 1) -> float:
    """FP8 numbers with a scale for each 128 × 1; those of each expert are filled up to whole tiles."""
    tiles = experts * ceil(rows / experts / TILE)
    return tiles * width * (TILE + _SCALE)


def _is_kept(kept: Kept, policy: Collection[RecomputeModule]) -> bool:
    return kept.part not in policy and (kept.source_of is None or kept.source_of in policy)


INPUT = "input"
NORMED = "norm before the feed-forward network"


def _attention(config: ModelConfig, batch: MicroBatch) -> Iterator[Kept]:
    """Up to the residual stream behind it."""

    def numbers(what: str, a_token: int, part: RecomputeModule | None = None, **more: object) -> Kept:
        return Kept(what, batch.tokens * a_token * batch.size, part, **more)  # type: ignore[arg-type]

    heads, query_rank, rank = config.num_attention_heads, config.q_lora_rank or 0, config.kv_lora_rank
    of_a_head = (
        2 * config.qk_head_dim + config.qk_nope_head_dim + config.v_head_dim
    )  # values hold unrotated keys' memory
    given = heads * config.v_head_dim
    yield numbers(INPUT, config.hidden_size)
    if batch.fp8:
        yield from _attention_tiles(config, batch)
        whole = query_rank + rank + (config.hidden_size if config.q_lora_rank is None else 0)
        yield numbers("norms", whole, RecomputeModule.NORM, source_of=RecomputeModule.UP_PROJECTION)
    else:
        yield numbers("norm before attention", config.hidden_size, RecomputeModule.NORM, for_weights=True)
        yield numbers("their norms", query_rank + rank, RecomputeModule.NORM, for_weights=True)
    yield numbers("compressed queries, keys and values", query_rank + rank + config.qk_rope_head_dim)
    yield numbers("queries, keys and values", heads * of_a_head, RecomputeModule.UP_PROJECTION)
    if batch.on_cpu:
        elements = batch.sequences * heads * kept_probabilities(batch.length)
        yield Kept("probabilities", elements * batch.size, RecomputeModule.ATTENTION)
    else:
        yield Kept("log of the sum of each softmax", batch.tokens * heads * batch.wide, RecomputeModule.ATTENTION)
    if not batch.fp8:
        yield numbers("what attention gives", given, RecomputeModule.ATTENTION, for_weights=True)
    yield numbers("residual", config.hidden_size)
    norms = 3 if config.q_lora_rank is None else 4
    yield Kept("a number a token of each norm", batch.tokens * norms * batch.wide)


def _attention_tiles(config: ModelConfig, batch: MicroBatch) -> Iterator[Kept]:
    """What Linears keep in FP8 of their inputs: each its own, also of the same input."""
    widths = [config.hidden_size, config.hidden_size, config.kv_lora_rank]
    widths += [] if config.q_lora_rank is None else [config.q_lora_rank]
    tiles = sum(tiles_bytes(batch.tokens, width) for width in widths)
    yield Kept("tiles of norms", tiles, RecomputeModule.NORM, for_weights=True)
    given = config.num_attention_heads * config.v_head_dim
    packed = batch.tokens * (_E5M6 * (given + given % 2) + tiles_of(given))
    yield Kept("E5M6 of what attention gives", packed, for_weights=True)


def _router(config: ModelConfig, batch: MicroBatch) -> Iterator[Kept]:
    normed = batch.tokens * config.hidden_size
    narrow = batch.wide > batch.size
    if not narrow or (config.n_shared_experts and not batch.fp8):  # the routed ones have copies of their own
        yield Kept(NORMED, normed * batch.size, RecomputeModule.NORM, for_weights=True)
    if narrow:
        yield Kept("the same for the router, in FP32", normed * batch.wide, RecomputeModule.NORM, for_weights=True)
    yield Kept("affinities", batch.tokens * config.n_routed_experts * batch.wide)
    yield Kept("choices", batch.tokens * config.num_experts_per_tok * _INDEX)
    sums = 1 + (
        config.num_experts_per_tok + 1 if config.norm_topk_prob else 0
    )  # of the balance loss; gates and their sum
    yield Kept("gates and sums", batch.tokens * sums * batch.wide)
    yield Kept("load of each sequence", batch.sequences * (config.n_routed_experts + 1) * batch.wide)


def _feed_forward(whose: str, rows: float, inner: int, config: ModelConfig, batch: MicroBatch) -> Iterator[Kept]:
    if batch.fp8:
        yield Kept(
            f"{whose}: tiles of their input",
            tiles_bytes(rows, config.hidden_size),
            RecomputeModule.NORM,
            for_weights=True,
        )
    else:
        yield Kept(NORMED, rows * config.hidden_size * batch.size, RecomputeModule.NORM, for_weights=True)
    yield from _inner(whose, rows, inner, batch)


def _inner(whose: str, rows: float, inner: int, batch: MicroBatch) -> Iterator[Kept]:
    if batch.fp8:  # SwiGLU is always made again from these
        yield Kept(f"{whose}: tiles of gate and up projections", tiles_bytes(rows, 2 * inner))
        return
    yield Kept(f"{whose}: gate and up projections", rows * 2 * inner * batch.size, RecomputeModule.GATE_UP)
    yield Kept(f"{whose}: SwiGLU", rows * inner * batch.size, RecomputeModule.SWIGLU, for_weights=True)
