"""Bytes that the forward of one layer keeps for its backward, from the shapes, under any policy of recomputing."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch

from ..model.causal import kept_probabilities
from ..model.config import ModelConfig
from ..model.recompute import Part

_INDEX = 8  # bytes of an int64


@dataclass(frozen=True)
class Kept:
    """One thing that is kept."""

    what: str
    bytes: float
    part: Part | None = None
    """The policy that makes it again instead; None where there is none."""


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
        """Bytes of a number of what is FP32 at least: gates, affinities, sums over a row."""
        return torch.promote_types(self.dtype, torch.float32).itemsize


def dense_layer(config: ModelConfig, batch: MicroBatch) -> list[Kept]:
    """Everything that a dense layer could keep."""
    return [
        *_attention(config, batch),
        _normed(config, batch),
        *_feed_forward("dense", batch.tokens, config.dense_ffn, batch),
    ]


def moe_layer(config: ModelConfig, batch: MicroBatch) -> list[Kept]:
    """Everything that a layer with routed experts could keep, with the routing tables of the `flat` exchange."""
    rows = batch.tokens * config.top_k if batch.rows is None else batch.rows
    return [
        *_attention(config, batch),
        *_router(config, batch),
        *_feed_forward("shared experts", batch.tokens, config.shared_experts * config.expert_ffn, batch),
        Kept("rows that came", rows * config.hidden * batch.size),
        Kept("their gate weights", rows * batch.wide),
        *_feed_forward("routed experts", rows, config.expert_ffn, batch),
        Kept("routing tables", _INDEX * (batch.tokens * (3 * config.top_k + 1) + 3 * rows)),
    ]


def kept_bytes(layer: Collection[Kept], policy: Collection[Part] = ()) -> float:
    """What is left of it under a policy."""
    return sum(kept.bytes for kept in layer if kept.part not in policy)


def _attention(config: ModelConfig, batch: MicroBatch) -> Iterator[Kept]:
    """Up to the residual stream behind it."""

    def numbers(what: str, a_token: int, part: Part | None = None) -> Kept:
        return Kept(what, batch.tokens * a_token * batch.size, part)

    heads, query_rank, rank = config.heads, config.q_lora_rank or 0, config.kv_lora_rank
    of_a_head = (
        2 * config.qk_head_dim + config.qk_nope_head_dim + config.v_head_dim
    )  # values hold unrotated keys' memory
    yield numbers("input", config.hidden)
    yield numbers("norm before attention", config.hidden, Part.NORM)
    yield numbers("compressed queries, keys and values", query_rank + rank + config.qk_rope_head_dim)
    yield numbers("their norms", query_rank + rank, Part.NORM)
    yield numbers("queries, keys and values", heads * of_a_head, Part.UP_PROJECTION)
    if batch.on_cpu:
        elements = batch.sequences * heads * kept_probabilities(batch.length)
        yield Kept("probabilities", elements * batch.size, Part.ATTENTION)
    else:
        yield Kept("log of the sum of each softmax", batch.tokens * heads * batch.wide, Part.ATTENTION)
    yield numbers("what attention gives", heads * config.v_head_dim, Part.ATTENTION)
    yield numbers("residual", config.hidden)
    norms = 3 if config.q_lora_rank is None else 4
    yield Kept("a number a token of each norm", batch.tokens * norms * batch.wide)


def _normed(config: ModelConfig, batch: MicroBatch) -> Kept:
    return Kept("norm before the feed-forward network", batch.tokens * config.hidden * batch.size, Part.NORM)


def _router(config: ModelConfig, batch: MicroBatch) -> Iterator[Kept]:
    if config.shared_experts or batch.wide == batch.size:  # the routed ones have copies of their own
        yield _normed(config, batch)
    if batch.wide > batch.size:
        yield Kept("the same for the router, in FP32", batch.tokens * config.hidden * batch.wide, Part.NORM)
    yield Kept("affinities", batch.tokens * config.experts * batch.wide)
    yield Kept("choices", batch.tokens * config.top_k * _INDEX)
    sums = 1 + (config.top_k + 1 if config.normalise_gates else 0)  # of the balance loss; gates and their sum
    yield Kept("gates and sums", batch.tokens * sums * batch.wide)
    yield Kept("load of each sequence", batch.sequences * (config.experts + 1) * batch.wide)


def _feed_forward(whose: str, rows: float, inner: int, batch: MicroBatch) -> Iterator[Kept]:
    yield Kept(f"{whose}: gate and up projections", rows * 2 * inner * batch.size, Part.GATE_UP)
    yield Kept(f"{whose}: SwiGLU", rows * inner * batch.size, Part.SWIGLU)
