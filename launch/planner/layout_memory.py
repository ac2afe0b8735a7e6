"""The memory of a layout that the planner looks at, by the runtime's own accounting (`trainer/memory/peak.py`)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from ...comm.exchange.deepep_buffer import DeepEPBufferShape
from ...comm.fp8 import TILE_WIDTH
from ...comm.topology import Topology
from ...parallelism.pipeline.liveness import LiveInstruction
from ...trainer.memory.activations import MicroBatchShape
from ...trainer.memory.chunk import ChunkMemorySimulator, MemoryKind, StageShape
from ...trainer.memory.exchange_buffers import ExchangeFormats
from ...trainer.memory.peak import NonAllocatorMemory, RankChunksMemory, RankMemory, predict_rank_memory
from ...trainer.memory.state import ParameterGroup, StateBytes
from ...trainer.memory.workspace import WorkspaceBytes
from ...trainer.model.config import ModelConfig
from ...trainer.model.recompute import RecomputeConfig
from .operations import LayerWorkload
from .recipe import ForecastRecipe, GemmPrecision


@dataclass(frozen=True)
class RankParameters:
    """What one rank holds: dense parts are replicated over data-parallel ranks, experts over their replicas."""

    dense: float
    routed: float
    dense_replicas: int
    """Over how many ranks the optimizer state of the dense part is spread."""
    routed_replicas: int
    embedding_and_head: float = 0.0
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
    def from_rank_memory(memory: RankMemory) -> MemoryForecast:
        """The same in the planner's words."""
        state, coming = memory.state, memory.at_peak
        return MemoryForecast(
            weights=state.weights + state.fp8_weights,
            gradients=state.gradients,
            optimizer=state.masters + state.moments,
            activations=coming[MemoryKind.ACTIVATIONS],
            deferred=coming[MemoryKind.DEFERRED],
            working=coming[MemoryKind.WORKING] + coming[MemoryKind.EXCHANGE] + coming[MemoryKind.MESSAGES],
            fixed=memory.non_allocator_bytes,
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


def workspace_from_shape(shape: LayerWorkload, recipe: ForecastRecipe) -> WorkspaceBytes:
    """What a micro-batch of this shape keeps and needs."""
    model = shape.model
    batch = MicroBatchShape(
        shape.micro_batch_size,
        shape.sequence_length,
        torch.float32 if recipe.precision is GemmPrecision.FP32 else torch.bfloat16,
        on_cpu=recipe.on_cpu,
        expert_rows_override=shape.routed_rows,
        fp8=recipe.precision is GemmPrecision.FP8,
        expert_block_rows=RecomputeConfig(expert_block_rows=recipe.expert_block_rows).resolve_expert_block_rows(
            shape.tokens * model.num_experts_per_tok
        ),
    )
    wire = ExchangeFormats.from_config(recipe.exchange, shape.ep_size)
    return WorkspaceBytes(model, batch, recipe.recompute, wire, model.n_routed_experts // shape.ep_size)


@dataclass
class ChunkMemoryCache:
    """Chunks of ranks, each run on paper once."""

    _working: dict[tuple[object, ...], WorkspaceBytes] = field(default_factory=dict)
    _chunks: dict[tuple[object, ...], RankChunksMemory] = field(default_factory=dict)

    def get_chunks(
        self, stages: Sequence[StageShape], shape: LayerWorkload, recipe: ForecastRecipe
    ) -> RankChunksMemory:
        """Those of a rank that holds `stages`."""
        computing = recipe.precision, recipe.recompute, recipe.exchange, recipe.expert_block_rows, recipe.on_cpu
        key = shape.micro_batch_size, shape.ep_size, shape.expert_skew, *computing
        if key not in self._working:
            self._working[key] = workspace_from_shape(shape, recipe)
        if (*key, *stages) not in self._chunks:
            self._chunks[*key, *stages] = RankChunksMemory(
                [ChunkMemorySimulator(stage, self._working[key]) for stage in stages]
            )
        return self._chunks[*key, *stages]


def forecast_rank_memory(
    worst: Collection[LiveInstruction], chunks: RankChunksMemory, state: StateBytes, outside: NonAllocatorMemory
) -> MemoryForecast:
    """One rank, whose program has these moments."""
    return MemoryForecast.from_rank_memory(
        predict_rank_memory(state, chunks, worst, between_instructions=(), optimizer_bytes=0.0, non_allocator=outside)
    )


def non_allocator_memory(shape: LayerWorkload, recipe: ForecastRecipe, topology: Topology) -> NonAllocatorMemory:
    """What no allocator sees of a rank's memory."""
    if recipe.on_cpu:
        return NonAllocatorMemory()
    buffer = DeepEPBufferShape(shape.tokens, shape.model.hidden_size, shape.model.num_experts_per_tok)
    return NonAllocatorMemory.for_exchange(
        recipe.exchange, buffer, topology.nodes_per_ep_group, topology.ep_ranks_per_node
    )


def model_state_bytes(recipe: ForecastRecipe, held: RankParameters) -> StateBytes:
    """Weights, gradients, optimizer state of one rank, and its FP8 copies."""
    weight, moment = recipe.high_precision_bytes, recipe.moment_bytes // 2
    parts = (held.dense, held.dense_replicas), (held.routed, held.routed_replicas)
    low = (
        2 * (1 + 4 / TILE_WIDTH**2) if recipe.precision is GemmPrecision.FP8 else 0.0
    )  # both layouts of a Linear's weight
    return StateBytes.from_groups(
        (ParameterGroup(count, copies, weight, moment_bytes=moment) for count, copies in parts),
        fp8_weights=low * (held.dense + held.routed - held.embedding_and_head),
    )


def count_stage_parameters(model: ModelConfig, stage: StageShape) -> tuple[float, float]:
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
    dense = (
        stage.dense_layers * (attention + 3 * hidden * model.intermediate_size)
        + (stage.moe_layers + depth) * routed_layer
    )
    dense += depth * (2 * hidden**2 + 3 * hidden)
    if stage.is_first:
        dense += model.vocab_size * hidden
    if stage.is_last:
        dense += model.vocab_size * hidden + hidden
    return float(dense), float((stage.moe_layers + depth) * model.n_routed_experts * expert)
