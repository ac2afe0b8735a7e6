"""Process groups of one rank, made once and passed as an argument.

A group of one rank has no communicator and costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .failure import failing_clearly
from .topology import Topology

T = TypeVar("T")

STAGED = 2**22  # elements that a reduction on gloo receives before it adds them


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
            with self.failing_clearly(what):
                dist.all_reduce(tensor, group=self.handle)
        return tensor

    def all_reduce_max(self, tensor: Tensor, what: str) -> Tensor:
        """Replace `tensor` by its largest over the group, element by element, in place, and return it."""
        if self.handle is not None:
            with self.failing_clearly(what):
                dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.handle)
        return tensor

    def all_to_all(
        self, arrived: Tensor, sent: Tensor, received_M: Sequence[int], sent_M: Sequence[int], what: str
    ) -> Tensor:
        """Fill `arrived` with the rows of `sent` that every rank has for this one; sizes in rows, by rank."""
        if self.handle is None:
            return arrived.copy_(sent)
        with self.failing_clearly(what):
            if arrived.is_cuda:
                dist.all_to_all_single(arrived, sent.contiguous(), list(received_M), list(sent_M), group=self.handle)
            else:
                self._message_each(arrived.split(list(received_M)), sent.contiguous().split(list(sent_M)))
        return arrived

    def reduce_scatter_sum(self, shards_GN: Tensor, what: str) -> None:
        """Replace this rank's row of `shards_GN`, [ranks, N], by its sum over the group; the others are garbage then.

        A rank sends all rows but its own, and nothing else. On gloo, whose own reduce-scatter is an all-reduce, a row
        is summed where it is owned: its own part first, then the others' in the order of their ranks.
        """
        if self.handle is None:
            return
        own_N = shards_GN[self.index]
        with self.failing_clearly(what):
            if shards_GN.is_cuda:
                dist.reduce_scatter_tensor(own_N, shards_GN, group=self.handle)
                return
            piece = max(1, STAGED // self.size)
            for begin in range(0, own_N.numel(), piece):
                part_GM = shards_GN[:, begin : begin + piece]
                arrived_GM = torch.empty_like(part_GM, memory_format=torch.contiguous_format)
                self._message_each(arrived_GM.unbind(), part_GM.unbind())
                for index, arrived_M in enumerate(arrived_GM):
                    if index != self.index:
                        own_N[begin : begin + piece] += arrived_M

    def all_gather(self, shards_GN: Tensor, what: str) -> None:
        """Fill every row of `shards_GN`, [ranks, N], with that of the rank that owns it."""
        if self.handle is None:
            return
        own_N = shards_GN[self.index]
        with self.failing_clearly(what):
            if shards_GN.is_cuda:
                dist.all_gather_into_tensor(shards_GN, own_N, group=self.handle)
            else:
                self._message_each(shards_GN.unbind(), [own_N] * self.size)

    def _message_each(self, buffers: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        """Send each rank its part, and fill a buffer with what each has for this one.

        gloo's own all-to-all often sends in one direction after the other: twice the time on a slow link. Here every
        receive is posted before the first send.
        """
        waiting: list[dist.Work | None] = []
        for peer, buffer in zip(self.ranks, buffers, strict=True):
            if peer != self.rank and buffer.numel():
                waiting.append(dist.irecv(buffer, src=peer, group=self.handle))
        # Each rank begins with its neighbour, so that not all send to the same one.
        for step in range(1, self.size):
            index = (self.index + step) % self.size
            if parts[index].numel():
                waiting.append(dist.isend(parts[index], dst=self.ranks[index], group=self.handle))
        buffers[self.index].copy_(parts[self.index])
        for work in waiting:
            if work is not None:
                work.wait(self.limit)

    def all_gather_objects(self, value: T, what: str) -> list[T]:
        """Every rank's small plain `value`, in the group's order."""
        if self.handle is None:
            return [value]
        values: list[T] = [value] * self.size
        with self.failing_clearly(what):
            dist.all_gather_object(values, value, group=self.handle)
        return values

    def barrier(self, what: str) -> None:
        """Wait for every rank of the group."""
        if self.handle is not None:
            with self.failing_clearly(what):
                dist.barrier(group=self.handle)

    def failing_clearly(self, what: str) -> AbstractContextManager[None]:
        """For collectives of a library over this group: what fails inside is `CollectiveFailed`."""
        if self.handle is None:
            return nullcontext()
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
    up: Group
    """The pipeline of this rank, for what travels towards its end."""
    down: Group
    """The same ranks, for what travels towards its beginning: neighbours send to each other at the same moment."""
    dense_dp: Group
    """The ranks of this pipeline rank: each of them reads its own samples."""
    dense: Mapping[tuple[int, ...], Group]
    """By the pipeline ranks that hold a dense parameter: the ranks over which its gradient is summed.

    These and `expert` belong to the worker that reduces gradients, not to the main thread."""
    expert: Mapping[tuple[int, ...], Group]
    """The same for the parameters of this rank's experts."""

    @property
    def pp_rank(self) -> int:
        """Pipeline position of this rank."""
        return self.topology.pp_rank(self.rank)

    @staticmethod
    def create(
        topology: Topology, rank: int, limit: timedelta, holders: Iterable[tuple[int, ...]] = ()
    ) -> ProcessGroups:
        """Collective over the default group: make every group of the grid and keep those that hold `rank`.

        `holders` are sets of pipeline ranks that hold some parameters in common, besides each rank alone; equal on all
        ranks. A new group does not inherit the default group's timeout, so each is given `limit`.
        Without a default group (one process) every group is this rank alone.
        """
        make = _Maker(topology, rank, limit)
        everyone = tuple(range(topology.world_size))
        alone = [(pp_rank,) for pp_rank in range(topology.pp)]
        shared = list(dict.fromkeys((*alone, *(tuple(sorted(set(each))) for each in holders))))

        def union(ranks_of: Callable[[int], tuple[int, ...]]) -> dict[tuple[int, ...], Group]:
            """Pipeline ranks outside a set make a group each, too, which they do not keep."""

            def holders_of(r: int, pp_ranks: tuple[int, ...]) -> tuple[int, ...]:
                mine = topology.pp_rank(r) in pp_ranks
                return topology.holders(ranks_of(r), pp_ranks if mine else (topology.pp_rank(r),))

            groups = {each: make.reducing(partial(holders_of, pp_ranks=each)) for each in shared}
            return {each: group for each, group in groups.items() if topology.pp_rank(rank) in each}

        return ProcessGroups(
            topology=topology,
            rank=rank,
            world=make.main(lambda r: everyone),
            ep=make.own(topology.ep_ranks),
            ep_between=make.own(topology.ep_ranks_between_nodes),
            ep_inside=make.own(topology.ep_ranks_inside_node),
            up=make.own(topology.pp_ranks),
            down=make.own(topology.pp_ranks),
            dense_dp=make.main(topology.dense_dp_ranks),
            dense=union(topology.dense_dp_ranks),
            expert=union(topology.expert_dp_ranks),
        )


class _Maker:
    """Makes groups. Every rank makes every group, in the same order.

    Groups that one thread uses share a communicator where their ranks are the same: those of the main thread, and those
    that gradients are reduced over. Two threads must not issue collectives on one.
    """

    def __init__(self, topology: Topology, rank: int, limit: timedelta) -> None:
        self._topology, self._rank, self._limit = topology, rank, limit
        self._main: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
        self._reducing: dict[tuple[int, ...], dist.ProcessGroup | None] = {}

    def main(self, ranks_of: Callable[[int], tuple[int, ...]]) -> Group:
        """The group of this rank, for the main thread."""
        return self._make(ranks_of, self._main)

    def reducing(self, ranks_of: Callable[[int], tuple[int, ...]]) -> Group:
        """The group of this rank, for the worker that reduces gradients."""
        return self._make(ranks_of, self._reducing)

    def own(self, ranks_of: Callable[[int], tuple[int, ...]]) -> Group:
        """The group of this rank, for a thread of its own."""
        return self._make(ranks_of, {})

    def _make(
        self, ranks_of: Callable[[int], tuple[int, ...]], made: dict[tuple[int, ...], dist.ProcessGroup | None]
    ) -> Group:
        for ranks in map(ranks_of, range(self._topology.world_size)):
            if ranks not in made:
                made[ranks] = dist.new_group(list(ranks), timeout=self._limit) if len(ranks) > 1 else None
        ranks = ranks_of(self._rank)
        return Group(ranks, made[ranks], self._rank, self._limit)
