"""The memory of a layout that the planner looks at, by the runtime's own accounting (`trainer/memory/peak.py`)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from ...comm.exchange.deepep_buffer import BufferShape
from ...comm.fp8 import TILE
from ...comm.topology import Topology
from ...parallelism.pipeline.liveness import LiveInstruction
from ...trainer.memory.activations import MicroBatch
from ...trainer.memory.buffers import ExchangeFormats
from ...trainer.memory.chunk import ChunkMemory, MemoryKind, StageShape
from ...trainer.memory.peak import Chunks, Outside, RankMemory, rank_memory
from ...trainer.memory.state import Portion, StateBytes
from ...trainer.memory.working import Working
from ...trainer.model.config import ModelConfig
from ...trainer.model.recompute import RecomputeConfig
from .operations import Shape
from .recipe import Precision, Recipe


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
    """What gradients of weights still need."""
    working: float
    """What layers, losses, exchanges and messages need while they run."""
    fixed: float
    """Exchange buffers, and what lies outside of the allocator."""

    @staticmethod
    def of(memory: RankMemory) -> MemoryForecast:
        """The same in the planner's words."""
        state, coming = memory.state, memory.at_worst
        return MemoryForecast(
            weights=state.weights + state.fp8_weights,
            gradients=state.gradients,
            optimizer=state.masters + state.moments,
            activations=coming[MemoryKind.ACTIVATIONS],
            deferred=coming[MemoryKind.DEFERRED],
            working=coming[MemoryKind.WORKING] + coming[MemoryKind.EXCHANGE] + coming[MemoryKind.MESSAGES],
            fixed=memory.fixed,
        )

    @property
    def total(self) -> float:
        """All of it."""
        parts: list[float] = list(self.__dict__.values())
        return sum(parts)

    @property
    def allocated(self) -> float:
        """Without what the allocator does not see."""
        return self.total - self.fixed


def working_of(shape: Shape, recipe: Recipe) -> Working:
    """What a micro-batch of this shape keeps and needs."""
    model = shape.model
    batch = MicroBatch(
        shape.micro_batch,
        shape.sequence_length,
        torch.float32 if recipe.precision is Precision.FP32 else torch.bfloat16,
        on_cpu=recipe.on_cpu,
        rows=shape.rows,
        fp8=recipe.precision is Precision.FP8,
        block=RecomputeConfig(expert_rows=recipe.expert_rows).rows_at_once(shape.tokens * model.num_experts_per_tok),
    )
    wire = ExchangeFormats.of(recipe.exchange, shape.expert_ranks)
    return Working(model, batch, recipe.recompute, wire, model.n_routed_experts // shape.expert_ranks)


@dataclass
class ChunkCache:
    """Chunks of ranks, each run on paper once."""

    _working: dict[tuple[object, ...], Working] = field(default_factory=dict)
    _chunks: dict[tuple[object, ...], Chunks] = field(default_factory=dict)

    def of(self, stages: Sequence[StageShape], shape: Shape, recipe: Recipe) -> Chunks:
        """Those of a rank that holds `stages`."""
        computing = recipe.precision, recipe.recompute, recipe.exchange, recipe.expert_rows, recipe.on_cpu
        key = shape.micro_batch, shape.expert_ranks, shape.skew, *computing
        if key not in self._working:
            self._working[key] = working_of(shape, recipe)
        if (*key, *stages) not in self._chunks:
            self._chunks[*key, *stages] = Chunks([ChunkMemory(stage, self._working[key]) for stage in stages])
        return self._chunks[*key, *stages]


def forecast_memory(
    worst: Collection[LiveInstruction], chunks: Chunks, state: StateBytes, outside: Outside
) -> MemoryForecast:
    """One rank, whose program has these moments."""
    return MemoryForecast.of(rank_memory(state, chunks, worst, between=(), update=0.0, outside=outside))


def outside_of(shape: Shape, recipe: Recipe, topology: Topology) -> Outside:
    """What no allocator sees of a rank's memory."""
    if recipe.on_cpu:
        return Outside()
    buffer = BufferShape(shape.tokens, shape.model.hidden_size, shape.model.num_experts_per_tok)
    return Outside.of(recipe.exchange, buffer, topology.ep_nodes, topology.ep_node_size)


def state_of(recipe: Recipe, held: Parameters) -> StateBytes:
    """Weights, gradients, optimizer state of one rank, and its FP8 copies."""
    weight, moment = recipe.wide, recipe.moment_bytes // 2
    parts = (held.dense, held.dense_copies), (held.routed, held.routed_copies)
    low = 2 * (1 + 4 / TILE**2) if recipe.precision is Precision.FP8 else 0.0  # both layouts of a Linear's weight
    return StateBytes.of(
        (Portion(count, copies, weight, moment=moment) for count, copies in parts),
        fp8_weights=low * (held.dense + held.routed - held.tables),
    )


def stage_parameters(model: ModelConfig, stage: StageShape) -> tuple[float, float]:
    """Dense and routed parameters of a stage, of all expert-parallel ranks together."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    query = hidden * heads * model.qk_head_dim
    if model.q_lora_rank is not None:
        query = model.q_lora_rank * (hidden + heads * model.qk_head_dim + 1)
    attention = query + hidden * (model.kv_lora_rank + model.qk_rope_head_dim) + heads * model.v_head_dim * hidden
    attention += model.kv_lora_rank * (heads * (model.qk_nope_head_dim + model.v_head_dim) + 1) + 2 * hidden
    expert = 3 * hidden * model.moe_intermediate_size
    routed_layer = attention + model.n_shared_experts * expert + hidden * model.n_routed_experts
    depth = model.num_nextn_predict_layers if stage.is_last else 0
    dense = stage.dense * (attention + 3 * hidden * model.intermediate_size) + (stage.routed + depth) * routed_layer
    dense += depth * (2 * hidden**2 + 3 * hidden)
    if stage.is_first:
        dense += model.vocab_size * hidden
    if stage.is_last:
        dense += model.vocab_size * hidden + hidden
    return float(dense), float((stage.routed + depth) * model.n_routed_experts * expert)
