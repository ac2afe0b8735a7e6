"""Assignment of a rank's parameters to buckets: by replicas, stages that use them, and dtype."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...parallelism.pipeline.liveness import last_use_on_any_rank
from ...parallelism.pipeline.program import PipelineProgram
from ...parallelism.zero.bucket import BucketParameter
from ..model.model import Model
from ..model.stage_layout import StageLayout


@dataclass(frozen=True)
class BucketPlan:
    """Description of a bucket that has not been allocated yet."""

    name: str
    members: list[BucketParameter]
    is_expert: bool
    using_stages: tuple[int, ...]
    """Stages that compute with it."""
    holding_pp_ranks: tuple[int, ...]
    """Pipeline ranks that hold it."""
    weight_dtype: torch.dtype
    """Dtype of the parameters that compute."""
    master_dtype: torch.dtype
    """Dtype of this rank's shard of the master weights."""


def plan_buckets(
    model: Model, stages: StageLayout, program: PipelineProgram, dtype: torch.dtype
) -> Iterator[BucketPlan]:
    """Yield the buckets of `model`, the chunks of one rank, by the last instruction of `program` that uses them.

    Parameters are kept in `dtype`, the compute dtype; norms and routers stay in the dtype of `model`.
    """
    experts, wide = model.expert_parameter_names(), model.fp32_parameter_names()
    members: dict[tuple[int, tuple[int, ...], bool, bool], list[BucketParameter]] = {}
    for name, parameter in model.named_parameters():
        # The last use on any rank, not on this one: the ranks that share a bucket must reduce in one order, or their
        # collectives would not match.
        users = stages.stages_using(name)
        key = (last_use_on_any_rank(program, users), users, name in experts, name in wide and parameter.dtype != dtype)
        # Weight decay is for matrices alone; norm weights are vectors.
        members.setdefault(key, []).append(BucketParameter(name, parameter, has_weight_decay=parameter.ndim >= 2))
    # The bucket whose gradients are complete first comes first: its reduction overlaps the rest of the backward.
    for (_, users, is_expert, is_wide), sharing in sorted(members.items()):
        masters = sharing[0].parameter.dtype
        kind = "experts" if is_expert else "wide dense" if is_wide else "dense"
        yield BucketPlan(
            name=f"{kind} of stage {' and '.join(map(str, users))}",
            members=sharing,
            is_expert=is_expert,
            using_stages=users,
            holding_pp_ranks=stages.pp_ranks_holding(sharing[0].name),
            weight_dtype=masters if is_wide else dtype,
            master_dtype=masters,
        )
