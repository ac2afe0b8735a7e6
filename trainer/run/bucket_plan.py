"""Buckets of a rank's parameters: by replicas, stages that use them, and dtype."""

from collections.abc import Iterator

import torch

from ...comm.groups import ProcessGroups
from ...parallelism.pipeline.liveness import last_use_on_any_rank
from ...parallelism.pipeline.program import PipelineProgram
from ...parallelism.zero.bucket import Bucket, BucketParameter
from ..model.model import Model
from ..model.stage_layout import StageLayout
from ..optimizer.config import OptimizerConfig


def build_buckets(
    model: Model,
    stages: StageLayout,
    program: PipelineProgram,
    groups: ProcessGroups,
    config: OptimizerConfig,
    dtype: torch.dtype,
) -> Iterator[tuple[Bucket, tuple[int, ...]]]:
    """Yield the buckets of `model`, the chunks of one rank, each with the stages that compute with it.

    Their order is that of the last instructions of `program` that use them. Parameters are kept in `dtype`, the compute
    dtype; norms and routers stay in the dtype of `model`.
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
        name = f"{kind} of stage {' and '.join(map(str, users))}"
        group = (groups.expert_dp if is_expert else groups.dense_dp)[stages.pp_ranks_holding(sharing[0].name)]
        yield Bucket(name, sharing, group, config.moments_dtype(masters), masters if is_wide else dtype), users
