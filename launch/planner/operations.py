"""Operations of a layer's phases: GEMMs, attention cores and memory-bound passes, from the model's shapes.

Letters: T tokens of a micro-batch, R rows that reach this rank's experts, D hidden, F expert FFN width.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from ...parallelism.pipeline.chunk_walk import LayerPart, phase_name
from ...parallelism.pipeline.program import Op
from ...trainer.model.config import ModelConfig
from ...trainer.model.loss import tokens_per_logit_block
from ...trainer.model.recompute import RecomputeModule
from .recipe import ForecastRecipe, GemmPrecision


class ComputePhase(StrEnum):
    """Compute phases that take time, named as in timelines; B computes input gradients, W weight gradients."""

    ATTENTION_F = phase_name(LayerPart.ATTENTION, Op.F)
    ATTENTION_B = phase_name(LayerPart.ATTENTION, Op.B)
    ATTENTION_W = phase_name(LayerPart.ATTENTION, Op.W)
    SHARED_EXPERTS_F = phase_name(LayerPart.SHARED_EXPERTS, Op.F)
    SHARED_EXPERTS_B = phase_name(LayerPart.SHARED_EXPERTS, Op.B)
    ROUTED_EXPERTS_F = phase_name(LayerPart.ROUTED_EXPERTS, Op.F)
    ROUTED_EXPERTS_B = phase_name(LayerPart.ROUTED_EXPERTS, Op.B)
    EXPERTS_W = phase_name(LayerPart.ROUTED_EXPERTS, Op.W)  # of shared and routed experts
    DENSE_LAYER_F = phase_name(LayerPart.DENSE_LAYER, Op.F)
    DENSE_LAYER_B = phase_name(LayerPart.DENSE_LAYER, Op.B)
    DENSE_LAYER_W = phase_name(LayerPart.DENSE_LAYER, Op.W)
    HEAD_F = phase_name(LayerPart.LOSS, Op.F)
    HEAD_B = phase_name(LayerPart.LOSS, Op.B)
    HEAD_W = phase_name(LayerPart.LOSS, Op.W)
    MTP_MERGE_F = phase_name(LayerPart.MTP_MERGE, Op.F)
    MTP_MERGE_B = phase_name(LayerPart.MTP_MERGE, Op.B)
    MTP_MERGE_W = phase_name(LayerPart.MTP_MERGE, Op.W)


class GemmRole(StrEnum):
    """One of a Linear's three GEMMs."""

    FORWARD = "forward"
    INPUT_GRADIENT = "input_gradient"
    WEIGHT_GRADIENT = "weight_gradient"


@dataclass(frozen=True)
class Gemm:
    """GEMM of one Linear, or the grouped GEMM of several experts: 2 · tokens · in_features · out_features FLOPs."""

    name: str
    role: GemmRole
    dtype: GemmPrecision
    tokens: int
    in_features: int
    out_features: int
    is_grouped: bool = False

    @property
    def flops(self) -> float:
        """FLOPs; a multiply-add is two."""
        return 2.0 * self.tokens * self.in_features * self.out_features


@dataclass(frozen=True)
class AttentionCore:
    """Causal attention core."""

    role: str
    flops: float


@dataclass(frozen=True)
class MemoryBoundKernel:
    """Memory-bound pass; `bytes` are the fewest that it must move."""

    kind: str
    table_phase: ComputePhase
    """Phase of the table row."""
    bytes: float


ComputeOperation = Gemm | AttentionCore | MemoryBoundKernel


@dataclass(frozen=True)
class LayerWorkload:
    """Model, and one rank's part of a micro-batch."""

    model: ModelConfig
    sequence_length: int
    micro_batch_size: int
    ep_size: int
    expert_skew: float = 0.0
    traced_rows: int | None = None
    """Rows that reached this rank's experts in a trace; None: the balanced number."""

    @property
    def tokens(self) -> int:
        """T, the tokens of a micro-batch."""
        return self.sequence_length * self.micro_batch_size

    @property
    def table_name(self) -> str:
        """Name of the shape in a table of whole phases."""
        return f"{self.micro_batch_size}x{self.sequence_length}/{self.ep_size}"

    @property
    def routed_rows(self) -> int:
        """R, the rows of the rank's experts: the balanced number times 1 + `expert_skew`."""
        if self.traced_rows is not None:
            return self.traced_rows
        return round(self.tokens * self.model.num_experts_per_tok * (1 + self.expert_skew))


def phase_operations(shape: LayerWorkload, recipe: ForecastRecipe, phase: ComputePhase) -> Iterator[ComputeOperation]:
    """Yield the operations of `phase` of one layer on one rank."""
    part, direction = phase.value[:-3], phase.value[-2]
    if part == "loss":
        # The runtime computes the gradients along with the loss, block by block, so that 129,280 logits per token never
        # exist together: all three GEMMs are in the forward, none in the backward.
        head = shape.tokens, shape.model.hidden_size, shape.model.vocab_size
        yield from (Gemm("head", role, _out_of_fp8(recipe), *head) for role in GemmRole if direction == "F")
        return
    role = {"F": GemmRole.FORWARD, "B": GemmRole.INPUT_GRADIENT, "W": GemmRole.WEIGHT_GRADIENT}[direction]
    # The runtime computes the weight gradients of shared and routed experts in one phase, mlp(W): it hides the
    # dispatch's backward (report fig. 4).
    for linears in ("shared", "mlp") if phase is ComputePhase.EXPERTS_W else (part,):
        yield from (replace(gemm, role=role) for gemm in _linears(shape, recipe, linears))
    if direction == "B":
        yield from _recomputed(shape, recipe, part)
    if part in ("attn", "dense") and direction != "W":
        yield from _core(shape, "forward" if direction == "F" else "backward")
    yield from _passes(shape, recipe, phase)


def _linears(shape: LayerWorkload, recipe: ForecastRecipe, part: str) -> Iterator[Gemm]:
    """Yield the forward GEMM of each Linear of a part."""
    model, hidden, inner = shape.model, shape.model.hidden_size, shape.model.moe_intermediate_size
    linears: list[tuple[str, int, int]] = []
    if part in ("attn", "dense"):
        linears += _attention_linears(model)
    if part == "dense":
        linears += _feed_forward_linears("ffn_", hidden, model.intermediate_size)
    elif part == "shared" and model.n_shared_experts:
        linears += _feed_forward_linears("shared_", hidden, inner * model.n_shared_experts)
    elif part == "mtp":
        linears.append(("mtp_merge", 2 * hidden, hidden))
    forward, low = GemmRole.FORWARD, recipe.precision
    yield from (Gemm(name, forward, low, shape.tokens, inputs, outputs) for name, inputs, outputs in linears)
    if part == "attn":
        yield Gemm("gate", forward, _out_of_fp8(recipe), shape.tokens, hidden, model.n_routed_experts)
    elif part == "mlp":
        for name, inputs, outputs in _feed_forward_linears("", hidden, inner):
            yield Gemm(name, forward, low, shape.routed_rows, inputs, outputs, is_grouped=True)


def _feed_forward_linears(prefix: str, hidden: int, inner: int) -> list[tuple[str, int, int]]:
    return [(f"{prefix}gate_up", hidden, 2 * inner), (f"{prefix}down", inner, hidden)]


def head_gradient_bytes(shape: LayerWorkload, recipe: ForecastRecipe) -> float:
    """Return the bytes moved to sum the head's FP32 gradient: per block of tokens one product and one addition.

    Not priced in `phase_operations`: no measurement of a head exists, and a fused kernel can sum in registers.
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


_RECOMPUTED_LINEARS = {
    RecomputeModule.UP_PROJECTION: ("q_proj", "q_up", "kv_up"),
    RecomputeModule.GATE_UP: ("gate_up", "shared_gate_up", "ffn_gate_up"),
}
"""Linears that a recompute module runs again. Norms and SwiGLU are in the memory passes, measured with recompute."""


def _recomputed(shape: LayerWorkload, recipe: ForecastRecipe, part: str) -> Iterator[ComputeOperation]:
    """Yield the operations that the backward recomputes."""
    modules = (linears for module, linears in _RECOMPUTED_LINEARS.items() if module in recipe.recompute)
    names = [name for linears in modules for name in linears]
    yield from (gemm for gemm in _linears(shape, recipe, part) if gemm.name in names)
    if RecomputeModule.ATTENTION in recipe.recompute and part in ("attn", "dense"):
        yield from _core(shape, "forward")


def _core(shape: LayerWorkload, role: str) -> Iterator[AttentionCore]:
    """Yield the attention core: two GEMMs forward, five backward, on the causal half of S x S."""
    model, length = shape.model, shape.sequence_length
    widths = model.qk_head_dim + model.v_head_dim
    if role == "backward":
        # S recomputed, dQ and dK are as wide as the query; dV and dP as the value. A flash kernel keeps no S x S.
        widths = 3 * model.qk_head_dim + 2 * model.v_head_dim
    yield AttentionCore(role, float(shape.micro_batch_size) * model.num_attention_heads * widths * length**2)


# Memory passes of each part, by the part of an MoE layer whose table rows they take; a dense layer is priced as
# attention plus a wide shared expert. They are 29.6 % of the compute streams' time in the public trace, so a forecast
# from GEMMs and attention alone is far too fast.
_KINDS: dict[str, dict[str, tuple[str, ...]]] = {
    "attn": {"attn": ("norm", "quantize", "rope", "router", "elementwise")},
    "mlp": {"mlp": ("norm", "quantize", "swiglu", "permute", "elementwise")},
    "dense": {"attn": ("norm", "quantize", "rope", "elementwise"), "mlp": ("quantize", "swiglu")},
}


def _passes(shape: LayerWorkload, recipe: ForecastRecipe, phase: ComputePhase) -> Iterator[MemoryBoundKernel]:
    part, direction = phase.value[:-3], phase.value[-2]
    if part == "dense":
        wide = replace(shape.model, n_shared_experts=1, moe_intermediate_size=shape.model.intermediate_size)
        shape = replace(shape, model=wide, traced_rows=0)
    for priced_as, kinds in _KINDS.get(part, {}).items():
        under = ComputePhase(f"{priced_as}({direction})")
        for kind in kinds:
            if kind != "quantize" or recipe.precision is GemmPrecision.FP8:
                yield MemoryBoundKernel(kind, under, memory_bound_kernel_bytes(shape, kind, under))


def memory_bound_kernel_bytes(shape: LayerWorkload, kind: str, phase: ComputePhase) -> float:
    """Return the fewest bytes that a pass of this kind must move in this phase of an MoE layer."""
    # Factors are bytes per element read and written, BF16 2 and FP8 1 each: 4 is a BF16 read and write, 3 a cast to
    # FP8, 6 is SwiGLU's two inputs and one output. Against a measured row only the ratio to the measured layer's bytes
    # counts.
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
