"""Memory of a candidate layout, by the runtime's accounting (`trainer/memory/layout.py`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...trainer.costs.operation_memory import MicroBatchShape
from ...trainer.memory.chunk import MemoryKind
from ...trainer.memory.layout import LayoutMemory, ShardedParameters
from ...trainer.memory.peak import RankMemory
from ...trainer.memory.workspace import WorkspaceBytes
from ...trainer.model.recompute import RecomputeConfig
from .operations import LayerWorkload
from .recipe import ForecastRecipe, GemmPrecision


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes of one rank at its peak."""

    weights: float
    """BF16 weights; in FP8 training also both layouts that the GEMMs read."""
    gradients: float
    """FP32 gradients."""
    optimizer_states: float
    """FP32 master weights and Adam moments, sharded; on a CPU also the average of the weights."""
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
            optimizer_states=state.masters + state.moments + state.average,
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
        return self.allocated + self.outside_allocator

    @property
    def allocated(self) -> float:
        """Bytes in torch's allocator."""
        return self.weights + self.gradients + self.optimizer_states + self.within_step

    @property
    def within_step(self) -> float:
        """Bytes that are allocated and freed within a step."""
        return self.activations + self.delayed_wgrad + self.temporary

    @property
    def temporary(self) -> float:
        """Bytes of one chunk's temporary tensors, exchanges and P2P messages."""
        return self.p2p_messages + self.exchange_buffers + self.workspace


def workspace_from_shape(shape: LayerWorkload, recipe: ForecastRecipe) -> WorkspaceBytes:
    """Return the activation and temporary bytes of one micro-batch of this shape."""
    rows = shape.tokens * shape.model.num_experts_per_tok
    batch = MicroBatchShape(
        shape.micro_batch_size,
        shape.sequence_length,
        torch.float32 if recipe.precision is GemmPrecision.FP32 else torch.bfloat16,
        on_cpu=recipe.on_cpu,
        expert_rows_override=shape.routed_rows,
        fp8=recipe.precision is GemmPrecision.FP8,
        expert_block_rows=RecomputeConfig(expert_block_rows=recipe.expert_block_rows).resolve_expert_block_rows(rows),
    )
    return WorkspaceBytes(shape.model, batch, recipe.recompute, recipe.exchange, shape.ep_size)


def candidate_memory(parameters: ShardedParameters, shape: LayerWorkload, recipe: ForecastRecipe) -> LayoutMemory:
    """Return the memory of a layout with these parameters."""
    return LayoutMemory(
        parameters, workspace_from_shape(shape, recipe), recipe.moment_bytes // 2, recipe.averages_weights
    )
