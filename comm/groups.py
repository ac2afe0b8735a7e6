"""Process groups of one rank, made once and passed as an argument.

A group of one rank has no communicator and costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from .communicator import Collectives, PeerTensors
from .errors import collective_error_context
from .group_factory import GlooGroupFactory, GroupFactory
from .topology import Topology
from .watchdog import Watchdog

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """Some ranks that communicate. `communicator` is None where `ranks` is this rank alone.

    `what` names a communication in the error of one that fails: every method raises `CollectiveError`.
    """

    ranks: tuple[int, ...]
    communicator: Collectives | None
    rank: int
    """This process, as one of `ranks`."""
    timeout: timedelta
    """How long a collective may take."""
    watchdog: Watchdog | None = None
    """Watches each call into the communication library; None for gloo, whose calls end at their limit."""

    @property
    def is_first_rank(self) -> bool:
        """Whether this process speaks for the group: writes its files, prints its lines."""
        return self.rank == self.ranks[0]

    @property
    def size(self) -> int:
        """How many ranks."""
        return len(self.ranks)

    @property
    def group_rank(self) -> int:
        """Position of this process among `ranks`."""
        return self.ranks.index(self.rank)

    @property
    def process_group(self) -> dist.ProcessGroup:
        """torch's process group, for libraries that take one. Only where there are several ranks."""
        assert self.communicator is not None
        return self.communicator.process_group

    def all_reduce_sum(self, tensor: Tensor, what: str) -> Tensor:
        """Replace `tensor` by its sum over the group, in place, and return it."""
        if self.communicator is not None:
            with self.collective_error_context(what):
                self.communicator.all_reduce(tensor, dist.ReduceOp.SUM)
        return tensor

    def all_reduce_max(self, tensor: Tensor, what: str) -> Tensor:
        """Replace `tensor` by its largest over the group, element by element, in place, and return it."""
        if self.communicator is not None:
            with self.collective_error_context(what):
                self.communicator.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def all_to_all(
        self, arrived: Tensor, sent: Tensor, received_M: Sequence[int], sent_M: Sequence[int], what: str
    ) -> Tensor:
        """Fill `arrived` with the rows of `sent` that every rank has for this one; sizes in rows, by rank."""
        if self.communicator is None:
            return arrived.copy_(sent)
        with self.collective_error_context(what):
            self.communicator.all_to_all(arrived, sent.contiguous(), received_M, sent_M)
        return arrived

    def reduce_scatter_sum(self, shards_GN: Tensor, what: str) -> None:
        """Replace this rank's row of `shards_GN`, [ranks, N], by its sum over the group; the others are garbage then.

        A rank sends all rows but its own, and nothing else.
        """
        if self.communicator is not None:
            with self.collective_error_context(what):
                self.communicator.reduce_scatter(shards_GN[self.group_rank], shards_GN)

    def all_gather(self, shards_GN: Tensor, what: str) -> None:
        """Fill every row of `shards_GN`, [ranks, N], with that of the rank that owns it."""
        if self.communicator is not None:
            with self.collective_error_context(what):
                self.communicator.all_gather(shards_GN, shards_GN[self.group_rank])

    def send_and_receive(self, sends: PeerTensors, receives: PeerTensors, what: str) -> None:
        """Exchange messages with some ranks of the group, as one batch."""
        if self.communicator is not None:
            peers = [peer for _, peer in (*sends, *receives)]
            with self._calling(what, peers):
                self.communicator.send_and_receive(sends, receives)

    def all_gather_objects(self, value: T, what: str) -> list[T]:
        """Every rank's small plain `value`, in the group's order."""
        if self.communicator is None:
            return [value]
        values: list[T] = [value] * self.size
        with self.collective_error_context(what):
            dist.all_gather_object(values, value, group=self.communicator.process_group)
        return values

    def barrier(self, what: str) -> None:
        """Wait for every rank of the group."""
        if self.communicator is not None:
            with self.collective_error_context(what):
                dist.barrier(group=self.communicator.process_group)

    def collective_error_context(self, what: str) -> AbstractContextManager[None]:
        """For collectives of a library over this group: what fails inside is `CollectiveError`."""
        if self.communicator is None:
            return nullcontext()
        return self._calling(what, self.ranks)

    @contextmanager
    def _calling(self, what: str, peers: Sequence[int]) -> Iterator[None]:
        watched = nullcontext() if self.watchdog is None else self.watchdog.watch_call(what, peers)
        with collective_error_context(self.rank, what, peers, self.timeout), watched:
            yield


@dataclass(frozen=True)
class ProcessGroups:
    """The groups of one rank."""

    topology: Topology
    rank: int
    world: Group
    """Every rank, for tensors on the device that the run computes on."""
    world_cpu: Group
    """Every rank, for tensors on the host: checkpoints, measurements. On a GPU no step uses it."""
    ep: Group
    """Spreads the experts: tokens are exchanged here."""
    ep_inter_node: Group
    """The ranks of `ep` with the same place in their nodes, one a node: what crosses between nodes goes here."""
    ep_intra_node: Group
    """The ranks of `ep` in this node."""
    pp_next: Group
    """The pipeline of this rank, for what travels towards its end."""
    pp_prev: Group
    """The same ranks, for what travels towards its beginning: neighbors send to each other at the same moment."""
    dense_dp: Mapping[tuple[int, ...], Group]
    """By the pipeline ranks that hold a dense parameter: the ranks over which its gradient is summed.

    These and `expert` belong to the worker that reduces gradients, not to the main thread."""
    expert_dp: Mapping[tuple[int, ...], Group]
    """The same for the parameters of this rank's experts."""
    watchdog: Watchdog | None = None
    """Of all of them but `control`."""

    @property
    def pp_rank(self) -> int:
        """Pipeline position of this rank."""
        return self.topology.pp_rank(self.rank)

    @staticmethod
    def create(
        topology: Topology,
        rank: int,
        timeout: timedelta,
        shared_pp_ranks: Iterable[tuple[int, ...]] = (),
        group_factory: GroupFactory | None = None,
        watchdog: Watchdog | None = None,
    ) -> ProcessGroups:
        """Collective over the default group: make every group of the grid and keep those that hold `rank`.

        `holders` are sets of pipeline ranks that hold some parameters in common, besides each rank alone; equal on all
        ranks. `open_groups` makes the groups, by default over gloo; `watchdog` watches their calls, but for those of
        `control`. Without a default group (one process) every group is this rank alone.
        """
        make = _Maker(topology, rank, timeout, group_factory or GlooGroupFactory(rank, timeout), watchdog)
        alone = [(pp_rank,) for pp_rank in range(topology.pp)]
        shared = list(dict.fromkeys((*alone, *(tuple(sorted(set(each))) for each in shared_pp_ranks))))
        everyone = tuple(range(topology.world_size))
        return ProcessGroups(
            topology=topology,
            rank=rank,
            world=make.world(everyone),
            world_cpu=make.control(everyone),
            ep=make.own("ep", topology.ep_ranks),
            ep_inter_node=make.own("ep inter-node", topology.ep_inter_node_ranks),
            ep_intra_node=make.own("ep intra-node", topology.ep_intra_node_ranks),
            pp_next=make.own("pp next", topology.pp_ranks, max_ctas=P2P_MAX_CTAS),
            pp_prev=make.own("pp prev", topology.pp_ranks, max_ctas=P2P_MAX_CTAS),
            dense_dp=make.reducing("dense gradients", topology.dense_dp_ranks, shared),
            expert_dp=make.reducing("expert gradients", topology.expert_dp_ranks, shared),
            watchdog=watchdog,
        )


P2P_MAX_CTAS = 4
"""Thread blocks of a message between pipeline stages: a receive that is posted ahead keeps its SMs while it waits, and
4 are enough for one InfiniBand port (50 GB/s)."""
REDUCE_MAX_CTAS = 8
"""Thread blocks of a reduce-scatter or all-gather of ZeRO-1, which runs beside the products of the backward."""

_Parts = tuple[tuple[int, ...], ...]


class _Maker:
    """Makes groups. Every rank makes every group, in the same order.

    Groups that gradients are reduced over share a communicator where their ranks are the same, because one thread uses
    them. Two threads, or two streams, must not issue collectives on one.
    """

    def __init__(
        self, topology: Topology, rank: int, limit: timedelta, open_groups: GroupFactory, watchdog: Watchdog | None
    ) -> None:
        self._topology, self._rank, self._limit, self._open = topology, rank, limit, open_groups
        self._watchdog = watchdog
        self._reducing: dict[_Parts, Collectives | None] = {}

    def world(self, everyone: tuple[int, ...]) -> Group:
        """The group of all ranks, for the main thread and tensors on the device."""
        return self._group(everyone, self._opened("all ranks", everyone, lambda: self._open.create_world(everyone)))

    def control(self, everyone: tuple[int, ...]) -> Group:
        """The group of all ranks for tensors on the host."""
        control = self._opened("world (CPU)", everyone, lambda: self._open.create_world_cpu(everyone))
        return replace(self._group(everyone, control), watchdog=None)

    def own(self, name: str, ranks_of: Callable[[int], tuple[int, ...]], max_ctas: int | None = None) -> Group:
        """The group of this rank, for a thread or a stream of its own."""
        parts = tuple(dict.fromkeys(map(ranks_of, range(self._topology.world_size))))
        return self._group(ranks_of(self._rank), self._split(name, parts, max_ctas))

    def reducing(
        self, name: str, ranks_of: Callable[[int], tuple[int, ...]], shared: Sequence[tuple[int, ...]]
    ) -> dict[tuple[int, ...], Group]:
        """The groups of this rank for the worker that reduces gradients, by the pipeline ranks that hold them."""
        topology, pp_rank = self._topology, self._topology.pp_rank(self._rank)
        groups = {}
        for holders in _disjoint(shared):
            parts = tuple(
                dict.fromkeys(
                    topology.map_to_pp_ranks(ranks_of(rank), pp_ranks)
                    for pp_ranks in holders
                    for rank in range(pp_ranks[0] * topology.dp, (pp_ranks[0] + 1) * topology.dp)
                )
            )
            if parts not in self._reducing:
                self._reducing[parts] = self._split(name, parts, REDUCE_MAX_CTAS)
            made = self._reducing[parts]
            for pp_ranks in holders:
                if pp_rank in pp_ranks:
                    groups[pp_ranks] = self._group(topology.map_to_pp_ranks(ranks_of(self._rank), pp_ranks), made)
        return groups

    def _split(self, name: str, parts: _Parts, max_ctas: int | None) -> Collectives | None:
        several = [ranks for ranks in parts if len(ranks) > 1]
        everyone = range(self._topology.world_size if several else 1)
        return self._opened(name, everyone, lambda: self._open.split_group(name, several, max_ctas))

    def _opened(self, name: str, ranks: Sequence[int], make: Callable[[], Collectives | None]) -> Collectives | None:
        """Make groups, which is collective over `ranks`; one rank alone has none."""
        if len(ranks) == 1:
            return None
        if self._watchdog is None:
            return make()
        with self._watchdog.watch_call(f"making the groups of {name}", ranks):
            return make()

    def _group(self, ranks: tuple[int, ...], communicator: Collectives | None) -> Group:
        return Group(ranks, communicator if len(ranks) > 1 else None, self._rank, self._limit, self._watchdog)


def _disjoint(sets: Iterable[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Distribute `sets` over lists of sets without a common member: the groups of a list are made by one split."""
    lists: list[list[tuple[int, ...]]] = []
    for each in sets:
        fitting = (found for found in lists if not any(set(each) & set(other) for other in found))
        chosen = next(fitting, None)
        if chosen is None:
            lists.append([each])
        else:
            chosen.append(each)
    return lists
