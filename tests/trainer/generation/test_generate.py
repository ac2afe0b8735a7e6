"""Text from logits that are not finite."""

from collections.abc import Sequence
from typing import cast

import pytest
import torch
from torch import Tensor

from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.parallelism.pipeline.executor import PipelineExecutor
from shoestring.trainer.generation.generate import generate
from shoestring.trainer.model.chunk import Chunk
from shoestring.trainer.run.exit import RunFailed
from shoestring.trainer.run.stage_runner import LogitsStage


class InfiniteLogits:
    """An executor whose last stage gives logits that allow no token."""

    def run(self, stages: Sequence[LogitsStage]) -> None:
        """Leave the logits with the stage."""
        stages[0].logits.append(torch.full((1, 1, 8), torch.inf))


class AloneInTheWorld:
    """The groups of one rank."""

    rank, topology = 0, Topology()

    @property
    def world(self) -> "AloneInTheWorld":
        """The group of one rank."""
        return self

    def all_reduce_sum(self, tensor: Tensor, what: str) -> Tensor:
        """Return this rank's tensor."""
        return tensor


def test_a_sample_of_logits_that_are_not_finite_is_a_failure_of_the_run() -> None:
    groups, executor = cast("ProcessGroups", AloneInTheWorld()), cast("PipelineExecutor", InfiniteLogits())
    with pytest.raises(RunFailed, match="logits of the sample's token 0 are not finite"):
        generate((cast("Chunk", None),), executor, [5], 6, 8, groups, torch.device("cpu"), seed=0)
