"""Which parameters of a rank share a bucket: those with the same replicas, users among the stages, and dtype."""

from __future__ import annotations

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
    """One bucket before it exists."""

    name: str
    members: list[BucketParameter]
    is_expert: bool
    using_stages: tuple[int, ...]
    """Stages that compute with it."""
    holding_pp_ranks: tuple[int, ...]
    """Pipeline ranks that hold it."""
    weight_dtype: torch.dtype
    """What they are kept in."""
    master_dtype: torch.dtype
    """And this rank's shard of them."""


def plan_buckets(
    model: Model, stages: StageLayout, program: PipelineProgram, dtype: torch.dtype
) -> Iterator[BucketPlan]:
    """The buckets of `model`, a rank's share, in the order in which `program` is done with them.

    Parameters are kept in `dtype`, which is what products are computed in, but for norms and routers.
    """
    experts, wide = model.expert_parameter_names(), model.fp32_parameter_names()
    members: dict[tuple[int, tuple[int, ...], bool, bool], list[BucketParameter]] = {}
    for name, parameter in model.named_parameters():
        users = stages.stages_using(name)
        key = (last_use_on_any_rank(program, users), users, name in experts, name in wide and parameter.dtype != dtype)
        members.setdefault(key, []).append(BucketParameter(name, parameter, has_weight_decay=parameter.ndim >= 2))
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
