"""Process groups of one rank, made once and passed as an argument.

A group of one rank has no communicator and costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from .failure import failing_clearly
from .topology import Topology

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """Some ranks that communicate. `handle` is None where `ranks` is this rank alone.

    `what` names a communication in the error of one that fails: every method raises `CollectiveFailed`.
    """

    ranks: tuple[int, ...]
    handle: dist.ProcessGroup | None
    rank: int
    """This process, as one of `ranks`."""
    limit: timedelta
    """How long a collective may take."""

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for the group: writes its files, prints its lines."""
        return self.rank == self.ranks[0]

    @property
    def size(self) -> int:
        """How many ranks."""
        return len(self.ranks)

    @property
    def index(self) -> int:
        """Position of this process among `ranks`."""
        return self.ranks.index(self.rank)

    def all_reduce_sum(self, tensor: Tensor, what: str) -> Tensor:
        """Replace `tensor` by its sum over the group, in place, and return it."""
        if self.handle is not None:
            with self._failing_clearly(what):
                dist.all_reduce(tensor, group=self.handle)
        return tensor

    def broadcast(self, tensor: Tensor, what: str) -> Tensor:
        """Replace `tensor` by that of the group's first rank, in place, and return it."""
        if self.handle is not None:
            with self._failing_clearly(what):
                dist.broadcast(tensor, src=self.ranks[0], group=self.handle)
        return tensor

    def all_to_all(
        self, arrived: Tensor, sent: Tensor, received_M: Sequence[int], sent_M: Sequence[int], what: str
    ) -> Tensor:
        """Fill `arrived` with the rows of `sent` that every rank has for this one; sizes in rows, by rank."""
        if self.handle is None:
            return arrived.copy_(sent)
        with self._failing_clearly(what):
            dist.all_to_all_single(arrived, sent.contiguous(), list(received_M), list(sent_M), group=self.handle)
        return arrived

    def all_gather_objects(self, value: T, what: str) -> list[T]:
        """Every rank's small plain `value`, in the group's order."""
        if self.handle is None:
            return [value]
        values: list[T] = [value] * self.size
        with self._failing_clearly(what):
            dist.all_gather_object(values, value, group=self.handle)
        return values

    def barrier(self, what: str) -> None:
        """Wait for every rank of the group."""
        if self.handle is not None:
            with self._failing_clearly(what):
                dist.barrier(group=self.handle)

    def _failing_clearly(self, what: str) -> AbstractContextManager[None]:
        return failing_clearly(self.rank, what, self.ranks, self.limit)


@dataclass(frozen=True)
class ProcessGroups:
    """The groups of one rank."""

    topology: Topology
    rank: int
    world: Group
    """Every rank."""
    ep: Group
    """Spreads the experts: tokens are exchanged here."""
    ep_between: Group
    """The ranks of `ep` with the same place in their nodes, one a node: what crosses between nodes goes here."""
    ep_inside: Group
    """The ranks of `ep` in this node."""
    dense_dp: Group
    """Same dense parameters: their gradients are summed here."""
    expert_dp: Group
    """Same experts: their gradients are summed here."""

    @staticmethod
    def create(topology: Topology, rank: int, limit: timedelta) -> ProcessGroups:
        """Collective over the default group: make every group of the grid and keep those that hold `rank`.

        A new group does not inherit the default group's timeout, so each is given `limit`.
        Without a default group (one process) every group is this rank alone.
        """

        def make(ranks_of: Callable[[int], tuple[int, ...]]) -> Group:
            mine = None
            # Every rank makes every group, in the same order.
            for ranks in dict.fromkeys(ranks_of(r) for r in range(topology.world_size)):
                handle = dist.new_group(list(ranks), timeout=limit) if len(ranks) > 1 else None
                if rank in ranks:
                    mine = Group(ranks, handle, rank, limit)
            assert mine is not None
            return mine

        everyone = tuple(range(topology.world_size))
        return ProcessGroups(
            topology=topology,
            rank=rank,
            world=make(lambda r: everyone),
            ep=make(topology.ep_ranks),
            ep_between=make(topology.ep_ranks_between_nodes),
            ep_inside=make(topology.ep_ranks_inside_node),
            dense_dp=make(topology.dense_dp_ranks),
            expert_dp=make(topology.expert_dp_ranks),
        )
