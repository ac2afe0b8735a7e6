"""First collectives, so that NCCL connects where no rank waits for another.

NCCL connects lazily: two ranks at their first message, a communicator's ring or tree at the first collective that uses
it. The calling host thread is blocked until all members have made the matching call. In a step some of them may get
there only after a message from the blocked rank; right after their creation all ranks call these in one order.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from .async_comm import AsyncCommunicator
from .groups import Group, ProcessGroups


def warm_up_exchange(
    name: str, groups: ProcessGroups, async_communicator: AsyncCommunicator, device: torch.device
) -> None:
    """Connect the groups of the token exchange called `name`; collective over the expert-parallel group.

    It runs on `worker`, as the exchange does. DeepEP connects its buffer when that is made.
    """
    for what, group in _groups_of(name, groups):
        async_communicator.submit(f"first all-to-all, {what}", partial(warm_up_all_to_all, group, device), ()).wait()


def warm_up_all_to_all(group: Group, device: torch.device) -> None:
    """Send a row to each rank of `group`; collective.

    torch leaves out messages of no row, so a pair would connect at the first token that is sent from one to the other.
    A pair connects all its channels at once, whatever the size.
    """
    rows_G1 = torch.zeros((group.size, 1), device=device)
    one_each = [1] * group.size
    group.all_to_all(torch.empty_like(rows_G1), rows_G1, one_each, one_each, "first all-to-all")


def warm_up_all_reduce(group: Group, like: torch.Tensor) -> None:
    """Sum zeros of the shape, dtype and device of `like` over `group`; collective.

    NCCL chooses the algorithm by the size, and connects only that one.
    """
    group.all_reduce_sum(torch.zeros_like(like), "first all-reduce")


def _groups_of(name: str, groups: ProcessGroups) -> Iterator[tuple[str, Group]]:
    if name != "deepep":
        yield "expert-parallel", groups.ep
    if name == "two_hop":
        yield "between nodes", groups.ep_inter_node
        yield "inside the node", groups.ep_intra_node
