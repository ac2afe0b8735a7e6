"""Memory of a candidate layout, by the runtime's accounting (`trainer/memory/layout.py`)."""

import torch

from ...trainer.costs.operation_memory import MicroBatchShape
from ...trainer.memory.peak import RankMemory
from ...trainer.memory.workspace import WorkspaceBytes
from ...trainer.model.recompute import RecomputeConfig
from .operations import LayerWorkload
from .recipe import ForecastRecipe, GemmPrecision


def memory_by_kind(memory: RankMemory) -> dict[str, float]:
    """Return the bytes of one rank at its peak, in the kinds that `simulate` and `plan` print.

    Weights include both FP8 layouts that the GEMMs read; optimizer states are FP32 masters and Adam moments, sharded,
    and on a CPU the average of the weights.
    """
    state = memory.state
    return {
        "weights": state.weights + state.fp8_weights,
        "gradients": state.gradients,
        "optimizer_states": state.masters + state.moments + state.average,
        **{kind.value: size for kind, size in memory.at_peak.items()},
        "outside_allocator": memory.non_allocator.total,
    }


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
