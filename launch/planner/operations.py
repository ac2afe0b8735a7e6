"""What the phases of a layer compute: GEMMs, attention cores and passes over memory, from the model's shapes.

Letters: T tokens of a micro-batch, R rows that reach this rank's experts, D hidden, F expert FFN width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from ...trainer.model.config import ModelConfig
from ...trainer.model.loss import tokens_per_logit_block
from ...trainer.model.recompute import RecomputeModule
from .recipe import ForecastRecipe, GemmPrecision


class ComputePhase(StrEnum):
    """Compute phases, in the words of the runtime's trace; B is for gradients of inputs, W for those of weights."""

    ATTENTION_F = "attn(F)"
    ATTENTION_B = "attn(B)"
    ATTENTION_W = "attn(W)"
    SHARED_EXPERTS_F = "shared(F)"
    SHARED_EXPERTS_B = "shared(B)"
    ROUTED_EXPERTS_F = "mlp(F)"
    ROUTED_EXPERTS_B = "mlp(B)"
    EXPERTS_W = "mlp(W)"
    DENSE_LAYER_F = "dense(F)"
    DENSE_LAYER_B = "dense(B)"
    DENSE_LAYER_W = "dense(W)"
    HEAD_F = "loss(F)"
    HEAD_B = "loss(B)"
    HEAD_W = "loss(W)"
    MTP_MERGE_F = "mtp(F)"
    MTP_MERGE_B = "mtp(B)"
    MTP_MERGE_W = "mtp(W)"


class GemmRole(StrEnum):
    """Which of a Linear's three GEMMs."""

    FORWARD = "forward"
    INPUT_GRADIENT = "input_gradient"
    WEIGHT_GRADIENT = "weight_gradient"


@dataclass(frozen=True)
class Gemm:
    """One Linear, or the same one of several experts: 2 · tokens · inputs · outputs FLOPs."""

    name: str
    role: GemmRole
    dtype: GemmPrecision
    tokens: int
    in_features: int
    out_features: int
    is_grouped: bool = False

    @property
    def flops(self) -> float:
        """2 a multiply-add."""
        return 2.0 * self.tokens * self.in_features * self.out_features


@dataclass(frozen=True)
class AttentionCore:
    """The attention core, causal."""

    role: str
    flops: float


@dataclass(frozen=True)
class MemoryBoundKernel:
    """A pass over memory; `bytes` are what must move at least once, in the shape that the table measured too."""

    kind: str
    table_phase: ComputePhase
    """Under which the table has it."""
    bytes: float


ComputeOperation = Gemm | AttentionCore | MemoryBoundKernel


@dataclass(frozen=True)
class LayerWorkload:
    """A model with what one rank sees of a micro-batch."""

    model: ModelConfig
    sequence_length: int
    micro_batch_size: int
    ep_size: int
    expert_skew: float = 0.0
    traced_rows: int | None = None
    """Rows that reached this rank, where a trace says so."""

    @property
    def tokens(self) -> int:
        """T."""
        return self.sequence_length * self.micro_batch_size

    @property
    def routed_rows(self) -> int:
        """R, with balanced routing and on the rank with the most of them above that by `skew`."""
        if self.traced_rows is not None:
            return self.traced_rows
        return round(self.tokens * self.model.num_experts_per_tok * (1 + self.expert_skew))


def phase_operations(shape: LayerWorkload, recipe: ForecastRecipe, phase: ComputePhase) -> Iterator[ComputeOperation]:
    """Everything that `phase` of one layer computes on one rank."""
    part, way = phase.value[:-3], phase.value[-2]
    if part == "loss":
        yield from _loss(shape, recipe, phase)
        return
    role = {"F": GemmRole.FORWARD, "B": GemmRole.INPUT_GRADIENT, "W": GemmRole.WEIGHT_GRADIENT}[way]
    # The runtime leaves the weights of shared and routed experts for the same moment.
    for linears in ("shared", "mlp") if phase is ComputePhase.EXPERTS_W else (part,):
        for name, tokens, inputs, outputs, dtype, grouped in _linears(shape, recipe, linears):
            yield Gemm(name, role, dtype, tokens, inputs, outputs, grouped)
    if way == "B":
        yield from _recomputed(shape, recipe, part)
    if part in ("attn", "dense") and way != "W":
        yield from _core(shape, "forward" if way == "F" else "backward")
    yield from _passes(shape, recipe, phase)


def _linears(
    shape: LayerWorkload, recipe: ForecastRecipe, part: str
) -> Iterator[tuple[str, int, int, int, GemmPrecision, bool]]:
    """Name, tokens, inputs, outputs, format and whether grouped of each Linear of a part."""
    model, tokens, low = shape.model, shape.tokens, recipe.precision
    hidden, inner = model.hidden_size, model.moe_intermediate_size
    if part in ("attn", "dense"):
        for name, inputs, outputs in _attention_linears(model):
            yield name, tokens, inputs, outputs, low, False
    if part == "attn":
        yield "gate", tokens, hidden, model.n_routed_experts, _out_of_fp8(recipe), False
    elif part == "dense":
        yield "ffn_gate_up", tokens, hidden, 2 * model.intermediate_size, low, False
        yield "ffn_down", tokens, model.intermediate_size, hidden, low, False
    elif part == "mtp":
        yield "mtp_merge", tokens, 2 * hidden, hidden, low, False
    if part == "shared" and model.n_shared_experts:
        yield "shared_gate_up", tokens, hidden, 2 * inner * model.n_shared_experts, low, False
        yield "shared_down", tokens, inner * model.n_shared_experts, hidden, low, False
    if part == "mlp":
        yield "gate_up", shape.routed_rows, hidden, 2 * inner, low, True
        yield "down", shape.routed_rows, inner, hidden, low, True


def _loss(shape: LayerWorkload, recipe: ForecastRecipe, phase: ComputePhase) -> Iterator[ComputeOperation]:
    """The runtime forms the gradients together with the loss: all three products are in the forward."""
    if phase is not ComputePhase.HEAD_F:
        return
    for role in GemmRole:
        dtype = _out_of_fp8(recipe)
        yield Gemm("head", role, dtype, shape.tokens, shape.model.hidden_size, shape.model.vocab_size)


def head_gradient_bytes(shape: LayerWorkload, recipe: ForecastRecipe) -> float:
    """Bytes that adding up the head's FP32 gradient moves: for each chunk of tokens a product, and the sum.

    No pass of `_loss`: nobody has measured a head, and a kernel may keep the sum to itself.
    """
    chunks = math.ceil(shape.tokens / tokens_per_logit_block(shape.model.vocab_size, on_gpu=True))
    return float(chunks) * shape.model.vocab_size * shape.model.hidden_size * (2 * recipe.high_precision_bytes + 2 * 4)


def _out_of_fp8(recipe: ForecastRecipe) -> GemmPrecision:
    return max(recipe.precision, GemmPrecision.BF16, key=lambda precision: precision.element_bytes)


def _attention_linears(model: ModelConfig) -> Iterator[tuple[str, int, int]]:
    hidden, heads, rank = model.hidden_size, model.num_attention_heads, model.q_lora_rank
    if rank is None:
        yield "q_proj", hidden, heads * model.qk_head_dim
    else:
        yield "q_down", hidden, rank
        yield "q_up", rank, heads * model.qk_head_dim
    yield "kv_down", hidden, model.kv_lora_rank + model.qk_rope_head_dim
    yield "kv_up", model.kv_lora_rank, heads * (model.qk_nope_head_dim + model.v_head_dim)
    yield "out", heads * model.v_head_dim, hidden


_REMADE = {
    RecomputeModule.UP_PROJECTION: ("q_proj", "q_up", "kv_up"),
    RecomputeModule.GATE_UP: ("gate_up", "shared_gate_up", "ffn_gate_up"),
}
"""Linears that a policy runs again. Norms and SwiGLU are in the measured passes, of a run that makes them again."""


def _recomputed(shape: LayerWorkload, recipe: ForecastRecipe, part: str) -> Iterator[ComputeOperation]:
    """What the backward makes again."""
    names = [name for policy, linears in _REMADE.items() if policy in recipe.recompute for name in linears]
    for name, tokens, inputs, outputs, dtype, grouped in _linears(shape, recipe, part):
        if name in names:
            yield Gemm(name, GemmRole.FORWARD, dtype, tokens, inputs, outputs, grouped)
    if RecomputeModule.ATTENTION in recipe.recompute and part in ("attn", "dense"):
        yield from _core(shape, "forward")


def _core(shape: LayerWorkload, role: str) -> Iterator[AttentionCore]:
    """Two matrix products forward, five backward, half of S x S."""
    model, length = shape.model, shape.sequence_length
    widths = model.qk_head_dim + model.v_head_dim
    if role == "backward":
        widths = 3 * model.qk_head_dim + 2 * model.v_head_dim
    yield AttentionCore(role, float(shape.micro_batch_size) * model.num_attention_heads * widths * length**2)


# Kinds of passes in each phase; a dense layer is attention and a wide shared expert.
_KINDS: dict[str, tuple[str, ...]] = {
    "attn": ("norm", "quantize", "rope", "router", "elementwise"),
    "mlp": ("norm", "quantize", "swiglu", "permute", "elementwise"),
    "dense": ("norm", "quantize", "rope", "elementwise"),
}


def _passes(shape: LayerWorkload, recipe: ForecastRecipe, phase: ComputePhase) -> Iterator[MemoryBoundKernel]:
    part, way = phase.value[:-3], phase.value[-2]
    for kind in _KINDS.get(part, ()):
        if kind == "quantize" and recipe.precision is not GemmPrecision.FP8:
            continue
        under = ComputePhase(f"attn({way})") if part == "dense" else phase
        yield MemoryBoundKernel(kind, under, memory_bound_kernel_bytes(shape, kind, under))
    if part == "dense":
        for kind in ("quantize", "swiglu"):
            if kind != "quantize" or recipe.precision is GemmPrecision.FP8:
                yield MemoryBoundKernel(kind, ComputePhase(f"mlp({way})"), _dense_bytes(shape, kind))


def memory_bound_kernel_bytes(shape: LayerWorkload, kind: str, phase: ComputePhase) -> float:
    """Bytes that a pass of this kind must move at least once in this phase of a routed layer."""
    model, tokens, rows = shape.model, shape.tokens, shape.routed_rows
    hidden, inner, heads = model.hidden_size, model.moe_intermediate_size, model.num_attention_heads
    if phase.value.startswith("mlp"):
        shared = tokens * model.n_shared_experts
        return {
            "norm": 4.0 * tokens * hidden,
            "quantize": 3.0 * (rows + shared) * (hidden + 2 * inner),
            "swiglu": 6.0 * (rows + shared) * inner,
            "permute": 4.0 * rows * hidden,
            "elementwise": 4.0 * tokens * hidden,
        }[kind]
    latents = (model.q_lora_rank or 0) + model.kv_lora_rank
    return {
        "norm": 4.0 * tokens * (2 * hidden + latents),
        "quantize": 3.0 * tokens * (hidden + latents + heads * model.v_head_dim),
        "rope": 8.0 * tokens * heads * model.qk_head_dim,
        "router": 8.0 * tokens * model.n_routed_experts,
        "elementwise": 4.0 * tokens * hidden,
    }[kind]


def _dense_bytes(shape: LayerWorkload, kind: str) -> float:
    model, tokens = shape.model, shape.tokens
    if kind == "quantize":
        return 3.0 * tokens * (model.hidden_size + 2 * model.intermediate_size)
    return 6.0 * tokens * model.intermediate_size
