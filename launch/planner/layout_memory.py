"""Memory of a candidate layout, by the runtime's accounting (`trainer/memory/peak.py`)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from ...comm.exchange.deepep_buffer import DeepEPBufferShape
from ...comm.fp8 import TILE_WIDTH
from ...comm.topology import Topology
from ...parallelism.pipeline.liveness import LiveInstruction
from ...trainer.costs.operation_memory import MicroBatchShape
from ...trainer.memory.chunk import ChunkMemorySimulator, MemoryKind, StageShape
from ...trainer.memory.peak import NonAllocatorMemory, RankChunksMemory, RankMemory, predict_rank_memory
from ...trainer.memory.state import ParameterGroup, StateBytes
from ...trainer.memory.workspace import WorkspaceBytes
from ...trainer.model.config import ModelConfig
from ...trainer.model.recompute import RecomputeConfig
from .operations import LayerWorkload
from .recipe import ForecastRecipe, GemmPrecision


@dataclass(frozen=True)
class RankParameters:
    """Parameters of one rank: dense ones are replicated over data-parallel ranks, experts over expert replicas."""

    dense: float
    routed: float
    dense_replicas: int
    """Ranks over which the optimizer state of the dense part is sharded."""
    routed_replicas: int
    embedding_and_head: float = 0.0
    """Parameters of embedding and head, a part of `dense`; they are never in FP8."""


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes of one rank at its peak."""

    weights: float
    """BF16 weights; in FP8 training also both layouts that the GEMMs read."""
    gradients: float
    """FP32 gradients."""
    optimizer_states: float
    """FP32 master weights and Adam moments, sharded."""
    activations: float
    """Activations of micro-batches in flight."""
    delayed_wgrad: float
    """Tensors held for delayed weight gradients."""
    p2p_messages: float
    """P2P messages between stages."""
    exchange_buffers: float
    """Buffers of token exchanges in flight, inside torch's allocator."""
    workspace: float
    """Temporary tensors of layers and losses."""
    outside_allocator: float
    """Exchange buffers and other memory outside torch's allocator."""

    @staticmethod
    def from_rank_memory(memory: RankMemory) -> MemoryForecast:
        """Group the kinds of `memory` as the planner prints them."""
        state, coming = memory.state, memory.at_peak
        return MemoryForecast(
            weights=state.weights + state.fp8_weights,
            gradients=state.gradients,
            optimizer_states=state.masters + state.moments,
            activations=coming[MemoryKind.ACTIVATIONS],
            delayed_wgrad=coming[MemoryKind.DELAYED_WGRAD],
            p2p_messages=coming[MemoryKind.P2P_MESSAGES],
            exchange_buffers=coming[MemoryKind.EXCHANGE_BUFFERS],
            workspace=coming[MemoryKind.WORKSPACE],
            outside_allocator=memory.non_allocator_bytes,
        )

    @property
    def total(self) -> float:
        """Bytes of all kinds together."""
        parts: list[float] = list(self.__dict__.values())
        return sum(parts)

    @property
    def allocated(self) -> float:
        """Bytes in torch's allocator."""
        return self.total - self.outside_allocator

    @property
    def temporary(self) -> float:
        """Bytes of one chunk's temporary tensors, exchanges and P2P messages."""
        return self.p2p_messages + self.exchange_buffers + self.workspace


def workspace_from_shape(shape: LayerWorkload, recipe: ForecastRecipe) -> WorkspaceBytes:
    """Return the activation and temporary bytes of one micro-batch of this shape."""
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
    return WorkspaceBytes(model, batch, recipe.recompute, recipe.exchange, shape.ep_size)


@dataclass
class ChunkMemoryCache:
    """Cache of simulated chunk memory, keyed by what its bytes depend on."""

    # A search considers thousands of layouts (11,232 for DeepSeek-V3 on 2,048 GPUs), of which many share a stage,
    # micro-batch and recipe; the allocations of a chunk are simulated once for all of them.
    _working: dict[tuple[object, ...], WorkspaceBytes] = field(default_factory=dict)
    _chunks: dict[tuple[object, ...], RankChunksMemory] = field(default_factory=dict)

    def get_chunks(
        self, stages: Sequence[StageShape], shape: LayerWorkload, recipe: ForecastRecipe
    ) -> RankChunksMemory:
        """Return the chunks of a rank that holds `stages`."""
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
    """Predict the memory of one rank at the instructions `worst`, where its program can have its peak."""
    return MemoryForecast.from_rank_memory(
        predict_rank_memory(state, chunks, worst, between_instructions=(), optimizer_bytes=0.0, non_allocator=outside)
    )


def non_allocator_memory(shape: LayerWorkload, recipe: ForecastRecipe, topology: Topology) -> NonAllocatorMemory:
    """Return the bytes of a rank outside torch's allocator: CUDA context, and NCCL's or DeepEP's buffers."""
    if recipe.on_cpu:
        return NonAllocatorMemory()
    # These bytes decide whether DeepSeek-V3 fits: with DeepEP's buffer (4.88 GB) the largest rank needs 87.2 GB of an
    # H800's 84.94, with `two_hop_fp8` 84.5.
    buffer = DeepEPBufferShape(shape.tokens, shape.model.hidden_size, shape.model.num_experts_per_tok)
    return NonAllocatorMemory.for_exchange(
        recipe.exchange, buffer, topology.nodes_per_ep_group, topology.ep_ranks_per_node
    )


def model_state_bytes(recipe: ForecastRecipe, held: RankParameters) -> StateBytes:
    """Return the bytes of weights, gradients and optimizer state of one rank, and of its FP8 weights."""
    weight, moment = recipe.high_precision_bytes, recipe.moment_bytes // 2
    parts = (held.dense, held.dense_replicas), (held.routed, held.routed_replicas)
    # FP8 GEMMs read a weight in both layouts: one for the forward, a transposed one for the input gradient. Each
    # 128x128 block has an FP32 scale (report §3.3.2).
    low = 2 * (1 + 4 / TILE_WIDTH**2) if recipe.precision is GemmPrecision.FP8 else 0.0
    return StateBytes.from_groups(
        (ParameterGroup(count, copies, weight, moment_bytes=moment) for count, copies in parts),
        fp8_weights=low * (held.dense + held.routed - held.embedding_and_head),
    )


def count_stage_parameters(model: ModelConfig, stage: StageShape) -> tuple[float, float]:
    """Return the (dense, routed) parameters of a stage; routed ones of all expert-parallel ranks together."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    query = hidden * heads * model.qk_head_dim
    if model.q_lora_rank is not None:
        query = model.q_lora_rank * (hidden + heads * model.qk_head_dim + 1)
    attention = query + hidden * (model.kv_lora_rank + model.qk_rope_head_dim) + heads * model.v_head_dim * hidden
    attention += model.kv_lora_rank * (heads * (model.qk_nope_head_dim + model.v_head_dim) + 1) + 2 * hidden
    expert = 3 * hidden * model.moe_intermediate_size
    routed_layer = attention + model.n_shared_experts * expert + hidden * model.n_routed_experts
    # An MTP module is one MoE layer, a projection of 2 x hidden inputs and three norms. It shares embedding and head,
    # which the first and the last stage count (report §2.2).
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
