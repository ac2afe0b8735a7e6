"""Which parameters of a rank share a bucket: those with the same replicas, users among the stages, and dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...parallelism.pipeline.liveness import last_use_anywhere
from ...parallelism.pipeline.program import Program
from ...parallelism.zero.bucket import Member
from ..model.model import Model
from ..model.stage_layout import Stages


@dataclass(frozen=True)
class BucketPlan:
    """One bucket before it exists."""

    name: str
    members: list[Member]
    is_expert: bool
    users: tuple[int, ...]
    """Stages that compute with it."""
    holders: tuple[int, ...]
    """Pipeline ranks that hold it."""
    weights: torch.dtype
    """What they are kept in."""
    masters: torch.dtype
    """And this rank's shard of them."""


def plan_buckets(model: Model, stages: Stages, program: Program, dtype: torch.dtype) -> Iterator[BucketPlan]:
    """The buckets of `model`, a rank's share, in the order in which `program` is done with them.

    Parameters are kept in `dtype`, which is what products are computed in, but for norms and routers.
    """
    experts, wide = model.expert_parameter_names(), model.wide_parameter_names()
    members: dict[tuple[int, tuple[int, ...], bool, bool], list[Member]] = {}
    for name, parameter in model.named_parameters():
        users = stages.users(name)
        key = (last_use_anywhere(program, users), users, name in experts, name in wide and parameter.dtype != dtype)
        members.setdefault(key, []).append(Member(name, parameter, decays=parameter.ndim >= 2))
    for (_, users, is_expert, is_wide), sharing in sorted(members.items()):
        masters = sharing[0].parameter.dtype
        kind = "experts" if is_expert else "wide dense" if is_wide else "dense"
        yield BucketPlan(
            name=f"{kind} of stage {' and '.join(map(str, users))}",
            members=sharing,
            is_expert=is_expert,
            users=users,
            holders=stages.holders(sharing[0].name),
            weights=masters if is_wide else dtype,
            masters=masters,
        )
