"""A first collective connects a group for all of the same size, so that none of them waits for another rank."""

import pytest
import torch

from shoestring.comm.warm_up import warm_up_all_reduce
from shoestring.tests.comm.nccl_rules import FIRST_CONTACT, RING_BYTES, QueuedStreams, open_group
from shoestring.tests.processes import RanksFailed, World, run_processes


def sum_on_one_rank(world: World, warm_bytes: int) -> None:
    """All-reduce on rank 0 alone: it is queued without waiting if the group is connected."""
    group = open_group(world, QueuedStreams(), patience=2)
    warm_up_all_reduce(group, torch.zeros(warm_bytes, dtype=torch.uint8))
    if world.rank == 0:
        group.all_reduce_sum(torch.zeros(RING_BYTES, dtype=torch.uint8), "sum")


def test_a_collective_of_the_same_size_waits_for_no_rank() -> None:
    run_processes(2, sum_on_one_rank, RING_BYTES)
    with pytest.raises(RanksFailed, match=FIRST_CONTACT):
        run_processes(2, sum_on_one_rank, 1)
