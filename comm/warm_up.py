"""First collectives right after the creation of groups, so that NCCL does not connect, and deadlock, inside a step."""

from collections.abc import Iterator
from functools import partial

import torch

from .async_comm import AsyncCommunicator
from .groups import Group, ProcessGroups


def warm_up_exchange(
    name: str, groups: ProcessGroups, async_communicator: AsyncCommunicator, device: torch.device
) -> None:
    """Connect the groups of the token dispatcher called `name`. Collective over the expert-parallel group.

    DeepEP connects when its buffer is created.
    """
    # NCCL connects lazily: two ranks at their first message, a ring or tree at the first collective that uses it. That
    # call blocks the host until every member has made it. In a step a member may get there only after a message from
    # the blocked rank, which is a deadlock. Here all ranks call in one order, on the stream that the exchange uses.
    for what, group in _groups_of(name, groups):
        async_communicator.submit(f"first all-to-all, {what}", partial(warm_up_all_to_all, group, device), ()).wait()


def warm_up_all_to_all(group: Group, device: torch.device) -> None:
    """Send one row to each rank of `group`. Collective."""
    # torch skips messages of zero rows, so a pair would connect at the first token that one sends to the other. One row
    # is enough: a pair connects all its channels together, whatever the size.
    rows_G1 = torch.zeros((group.size, 1), device=device)
    one_each = [1] * group.size
    group.all_to_all(torch.empty_like(rows_G1), rows_G1, one_each, one_each, "first all-to-all")


def warm_up_all_reduce(group: Group, like: torch.Tensor) -> None:
    """Sum zeros of the shape, dtype and device of `like` over `group`. Collective."""
    # Of that size because NCCL chooses the algorithm (ring, tree, NVLS) by the size and connects only that one.
    group.all_reduce_sum(torch.zeros_like(like), "first all-reduce")


def _groups_of(name: str, groups: ProcessGroups) -> Iterator[tuple[str, Group]]:
    if name != "deepep":
        yield "expert-parallel", groups.ep
    if name == "two_hop":
        yield "between nodes", groups.ep_inter_node
        yield "inside the node", groups.ep_intra_node
