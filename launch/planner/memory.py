"""Bytes of one pipeline rank, by replaying its program: what stays, and what is alive at the worst moment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from ...parallelism.pipeline.program import Instruction, Op
from ...trainer.model.config import ModelConfig
from ...trainer.model.recompute import Part
from .lanes import StageShape
from .operations import Shape
from .recipe import NOTHING, Precision, Recipe

EXCHANGE_BUFFERS = 1.0e9
"""Assumed: the buffers of an exchange's kernels."""
CONTEXT = 2.0e9
"""Assumed: CUDA context, NCCL and libraries, outside of the allocator."""
_FP8_ELEMENT = 1 + 4 / 128  # with an FP32 scale for 128 elements
_E5M6_ELEMENT = 1.5  # inputs of the Linear after attention (report §3.3.3)


@dataclass(frozen=True)
class Parameters:
    """What one rank holds: dense parts are replicated over data-parallel ranks, experts over their replicas."""

    dense: float
    routed: float
    dense_copies: int
    """Over how many ranks the optimizer state of the dense part is spread."""
    routed_copies: int
    tables: float = 0.0
    """Of the dense part, embedding and head, which are never in FP8."""


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes of one rank at its worst moment."""

    weights: float
    """BF16, and in FP8 training both layouts that the GEMMs read."""
    gradients: float
    """FP32."""
    optimizer: float
    """Masters and moments, sharded."""
    activations: float
    """Of micro-batches in flight."""
    deferred: float
    """Gradients that a W still needs."""
    working: float
    """What one layer and the losses need while they run."""
    fixed: float
    """Exchange buffers, and what lies outside of the allocator."""

    @property
    def total(self) -> float:
        """All of it."""
        parts: list[float] = list(self.__dict__.values())
        return sum(parts)

    @property
    def allocated(self) -> float:
        """Without what the allocator does not see."""
        return self.total - self.fixed


@cache
def activation_bytes(shape: Shape, recipe: Recipe, *, routed: bool) -> float:
    """What one layer keeps of one micro-batch for its backward."""
    return sum(size for _, size in kept(shape, recipe, routed=routed))


def kept(shape: Shape, recipe: Recipe, *, routed: bool) -> Iterator[tuple[str, float]]:
    """Every tensor that a layer keeps, with its bytes."""
    yield from _kept_by_attention(shape, recipe)
    model, tokens, policy = shape.model, shape.tokens, recipe.recompute
    wide, narrow = _elements(recipe)
    inner = model.shared_experts * model.expert_ffn if routed else model.dense_ffn
    if Part.NORM not in policy:
        yield "input of the feed-forward network", tokens * model.hidden * wide
    if Part.SWIGLU not in policy:
        yield "SwiGLU output", tokens * inner * wide
    if inner and Part.GATE_UP not in policy:
        yield "SwiGLU input", tokens * 2 * inner * narrow
    if routed:
        yield "dispatched rows", shape.rows * model.hidden * narrow
        if Part.GATE_UP not in policy:
            yield "experts' SwiGLU input", shape.rows * 2 * model.expert_ffn * narrow
        if Part.SWIGLU not in policy:
            yield "experts' SwiGLU output", shape.rows * model.expert_ffn * wide
        if not policy:
            yield "experts' results", shape.rows * model.hidden * wide


def _elements(recipe: Recipe) -> tuple[float, float]:
    """Bytes of an element as computed, and as cached for a weight gradient."""
    wide = float(recipe.wide)
    return wide, _FP8_ELEMENT if recipe.recompute and recipe.precision is Precision.FP8 else wide


def _kept_by_attention(shape: Shape, recipe: Recipe) -> Iterator[tuple[str, float]]:
    model, tokens, heads = shape.model, shape.tokens, shape.model.heads
    wide, narrow = _elements(recipe)
    latents = (model.q_lora_rank or 0) + model.kv_lora_rank + model.qk_rope_head_dim
    yield "residual stream, twice", 2 * tokens * model.hidden * wide
    yield "compressed query, key and value", tokens * latents * wide
    out = _E5M6_ELEMENT if narrow < wide else wide
    if Part.ATTENTION not in recipe.recompute:  # with the FP32 log-sum of each head
        yield "attention output", tokens * heads * (model.v_head_dim * out + 4)
    if Part.NORM not in recipe.recompute:
        yield "normed inputs", tokens * (model.hidden + latents) * wide
    if Part.UP_PROJECTION not in recipe.recompute:
        yield "query, key and value", tokens * heads * (2 * model.qk_head_dim + model.v_head_dim) * wide


def deferred_bytes(shape: Shape, recipe: Recipe, stage: StageShape) -> float:
    """Output gradients of every Linear of a stage, kept from its I to its W."""
    model, tokens, rows = shape.model, shape.tokens, shape.rows
    element = _FP8_ELEMENT if recipe.precision is Precision.FP8 else float(recipe.precision.bytes)
    outputs = (model.q_lora_rank or 0) + model.heads * model.qk_head_dim + model.kv_lora_rank + model.hidden
    outputs += model.heads * (model.qk_nope_head_dim + model.v_head_dim)
    dense = outputs + 2 * model.dense_ffn + model.hidden
    shared = outputs + model.shared_experts * 2 * model.expert_ffn + model.hidden
    routed = rows * (2 * model.expert_ffn + model.hidden) + tokens * shared
    layers = stage.routed + (model.mtp_depth if stage.is_last else 0)
    return element * (stage.dense * tokens * dense + layers * routed)


def stage_activations(shape: Shape, recipe: Recipe, stage: StageShape) -> float:
    """What a stage keeps of one micro-batch."""
    depth = shape.model.mtp_depth if stage.is_last else 0
    held = stage.dense * activation_bytes(shape, recipe, routed=False)
    held += (stage.routed + depth) * activation_bytes(shape, recipe, routed=True)
    if stage.is_last:
        held += (1 + 3 * depth) * shape.tokens * shape.model.hidden * max(2, recipe.precision.bytes)
    return held


Occupancy = frozenset[tuple[tuple[int, ...], tuple[int, ...]]]
"""Every moment of one rank that may be its worst: of each chunk, micro-batches alive and waiting for their W."""


def occupancy(instructions: Sequence[Instruction]) -> Occupancy:
    """Replay the instructions of one rank."""
    chunks = 1 + max((work.chunk for entry in instructions for work in entry.works), default=0)
    alive, waiting = [0] * chunks, [0] * chunks
    moments = set()
    for entry in instructions:
        if entry.forward is not None:
            alive[entry.forward.chunk] += 1
        moments.add((tuple(alive), tuple(waiting)))
        if entry.backward is None:
            continue
        if entry.op is Op.I:
            waiting[entry.backward.chunk] += 1
            moments.add((tuple(alive), tuple(waiting)))
        else:
            alive[entry.backward.chunk] -= 1
            waiting[entry.backward.chunk] -= entry.op is Op.W
    return frozenset(moment for moment in moments if not any(_exceeds(other, moment) for other in moments))


def _exceeds(a: tuple[tuple[int, ...], ...], b: tuple[tuple[int, ...], ...]) -> bool:
    """Whether `a` holds as much as `b` of everything, and more of something."""
    return a != b and all(x >= y for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True))


def forecast_memory(
    moments: Occupancy, stages: Sequence[StageShape], shape: Shape, recipe: Recipe, held: Parameters
) -> MemoryForecast:
    """The worst of the `moments` of one rank, whose chunks hold `stages`."""
    alive = [stage_activations(shape, recipe, stage) for stage in stages]
    pending = [deferred_bytes(shape, recipe, stage) for stage in stages]
    activations, deferred = max((_held(moment, alive, pending) for moment in moments), key=sum)
    weights, gradients, optimizer = static_bytes(recipe, held)
    return MemoryForecast(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        deferred=deferred,
        working=_working(shape, recipe, stages),
        fixed=CONTEXT + (EXCHANGE_BUFFERS if shape.expert_ranks > 1 else 0.0),
    )


def static_bytes(recipe: Recipe, held: Parameters) -> tuple[float, float, float]:
    """Weights, gradients, optimizer state of one rank: 6 + 8/d bytes a parameter with BF16 moments, and FP8 copies."""
    low = 2.0 if recipe.precision is Precision.FP8 else 0.0  # both layouts of a Linear's weight
    count = held.dense + held.routed
    weights = max(2, recipe.precision.bytes) * count + low * (count - held.tables)
    shards = held.dense / held.dense_copies + held.routed / held.routed_copies
    return weights, 4.0 * count, (4.0 + recipe.moment_bytes) * shards


def _held(
    moment: tuple[tuple[int, ...], tuple[int, ...]], alive: Sequence[float], pending: Sequence[float]
) -> tuple[float, float]:
    """Activations and deferred gradients at one moment."""
    counts, waiting = moment
    return (
        sum(count * size for count, size in zip(counts, alive, strict=True)),
        sum(count * size for count, size in zip(waiting, pending, strict=True)),
    )


def _working(shape: Shape, recipe: Recipe, stages: Sequence[StageShape]) -> float:
    """One layer without savings while it runs, and the logits of one loss with their gradient."""
    everything = Recipe(precision=recipe.precision, recompute=NOTHING)
    routed = any(stage.routed or (stage.is_last and shape.model.mtp_depth) for stage in stages)
    layer = activation_bytes(shape, everything, routed=routed)
    if not recipe.recompute:
        layer = 0.0  # it is among the activations
    wide = max(2, recipe.precision.bytes)
    logits = shape.tokens * shape.model.vocabulary * (4.0 + wide) if any(s.is_last for s in stages) else 0.0
    return layer + logits


def stage_parameters(model: ModelConfig, stage: StageShape) -> tuple[float, float]:
    """Dense and routed parameters of a stage, of all expert-parallel ranks together."""
    hidden, heads = model.hidden, model.heads
    query = hidden * heads * model.qk_head_dim
    if model.q_lora_rank is not None:
        query = model.q_lora_rank * (hidden + heads * model.qk_head_dim + 1)
    attention = query + hidden * (model.kv_lora_rank + model.qk_rope_head_dim) + heads * model.v_head_dim * hidden
    attention += model.kv_lora_rank * (heads * (model.qk_nope_head_dim + model.v_head_dim) + 1) + 2 * hidden
    expert = 3 * hidden * model.expert_ffn
    routed_layer = attention + model.shared_experts * expert + hidden * model.experts
    depth = model.mtp_depth if stage.is_last else 0
    dense = stage.dense * (attention + 3 * hidden * model.dense_ffn) + (stage.routed + depth) * routed_layer
    dense += depth * (2 * hidden**2 + 3 * hidden)
    if stage.is_first:
        dense += model.vocabulary * hidden
    if stage.is_last:
        dense += model.vocabulary * hidden + hidden
    return float(dense), float((stage.routed + depth) * model.experts * expert)
