"""Process groups of one rank, made once and passed as an argument.

A group of one rank has no communicator and costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from .topology import Topology


@dataclass(frozen=True)
class Group:
    """Some ranks that communicate. `handle` is None where `ranks` is this rank alone."""

    ranks: tuple[int, ...]
    handle: dist.ProcessGroup | None
    rank: int
    """This process, as one of `ranks`."""

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for the group: writes its files, prints its lines."""
        return self.rank == self.ranks[0]

    @property
    def size(self) -> int:
        """How many ranks."""
        return len(self.ranks)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over the group, in place, and return it."""
        if self.handle is not None:
            dist.all_reduce(tensor, group=self.handle)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by that of the group's first rank, in place, and return it."""
        if self.handle is not None:
            dist.broadcast(tensor, src=self.ranks[0], group=self.handle)
        return tensor

    def barrier(self) -> None:
        """Wait for every rank of the group."""
        if self.handle is not None:
            dist.barrier(group=self.handle)


@dataclass(frozen=True)
class ProcessGroups:
    """The groups of one rank."""

    topology: Topology
    rank: int
    world: Group
    """Every rank."""
    ep: Group
    """Spreads the experts: tokens are exchanged here."""
    dense_dp: Group
    """Same dense parameters: their gradients are summed here."""
    expert_dp: Group
    """Same experts: their gradients are summed here."""

    @staticmethod
    def create(topology: Topology, rank: int, timeout: timedelta) -> ProcessGroups:
        """Collective over the default group: make every group of the grid and keep those that hold `rank`.

        A new group does not inherit the default group's timeout, so `timeout` is given to each.
        Without a default group (one process) every group is this rank alone.
        """

        def make(ranks_of: list[tuple[int, ...]]) -> Group:
            mine = None
            for ranks in dict.fromkeys(ranks_of):  # every rank makes every group, in the same order
                handle = dist.new_group(list(ranks), timeout=timeout) if len(ranks) > 1 else None
                if rank in ranks:
                    mine = Group(ranks, handle, rank)
            assert mine is not None
            return mine

        everyone = range(topology.world_size)
        return ProcessGroups(
            topology=topology,
            rank=rank,
            world=make([tuple(everyone)]),
            ep=make([topology.ep_ranks(r) for r in everyone]),
            dense_dp=make([topology.dense_dp_ranks(r) for r in everyone]),
            expert_dp=make([topology.expert_dp_ranks(r) for r in everyone]),
        )
