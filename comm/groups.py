"""Process groups of one rank, created once and passed as an argument.

A group of one rank has no communicator and its operations do nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from .communicator import Collectives, GlooCollectives, PeerTensors
from .errors import collective_error_context
from .group_factory import GlooGroupFactory, GroupFactory
from .topology import Topology
from .watchdog import Watchdog

T = TypeVar("T")
_ADOPTED_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Group:
    """A process group. `communicator` is None where `ranks` is this rank alone.

    Every method raises `CollectiveError`, which names the operation by its argument `what`.
    """

    ranks: tuple[int, ...]
    communicator: Collectives | None
    rank: int
    """Global rank of this process, one of `ranks`."""
    timeout: timedelta
    """Longest time that a collective may take."""
    watchdog: Watchdog | None = None
    """Watchdog of each call into the communication library; None for gloo, whose calls end at their timeout."""

    @staticmethod
    def from_process_group(
        process_group: dist.ProcessGroup | None = None, timeout: timedelta = _ADOPTED_TIMEOUT
    ) -> "Group":
        """Return the group of torch's `process_group` (None: the default one), such as `mesh.get_group("ep")`.

        Not collective. A group with NCCL is for tensors on a GPU. `timeout` is that of gloo's messages; NCCL keeps the
        process group's own.
        """
        adopted = dist.group.WORLD if process_group is None else process_group
        assert adopted is not None, "call torch.distributed.init_process_group first"
        ranks, rank = tuple(dist.get_process_group_ranks(adopted)), dist.get_rank()
        communicator: Collectives | None = None
        if len(ranks) > 1:
            # Not `get_backend`: it says "undefined" where `init_process_group` was called without a backend.
            on_nccl = "nccl" in dist.get_backend_config(adopted)
            communicator = Collectives(adopted) if on_nccl else GlooCollectives(adopted, ranks, rank, timeout)
        return Group(ranks, communicator, rank, timeout)

    @property
    def is_first_rank(self) -> bool:
        """True on the rank that writes the group's files and prints its lines."""
        return self.rank == self.ranks[0]

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def group_rank(self) -> int:
        """Position of this process among `ranks`."""
        return self.ranks.index(self.rank)

    @property
    def process_group(self) -> dist.ProcessGroup:
        """torch's process group, for libraries that take one; exists only with several ranks."""
        assert self.communicator is not None
        return self.communicator.process_group

    def all_reduce_sum(self, tensor: Tensor, what: str) -> Tensor:
        """Replace `tensor` by its sum over the group, in place, and return it."""
        if self.communicator is not None:
            with self.collective_error_context(what):
                self.communicator.all_reduce(tensor, dist.ReduceOp.SUM)
        return tensor

    def all_reduce_max(self, tensor: Tensor, what: str) -> Tensor:
        """Replace `tensor` by its element-wise maximum over the group, in place, and return it."""
        if self.communicator is not None:
            with self.collective_error_context(what):
                self.communicator.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def all_to_all(
        self, arrived: Tensor, sent: Tensor, received_M: Sequence[int], sent_M: Sequence[int], what: str
    ) -> Tensor:
        """Send `sent_M[i]` rows of `sent` to rank i; fill `arrived` with `received_M[i]` rows from each rank i."""
        if self.communicator is None:
            return arrived.copy_(sent)
        with self.collective_error_context(what):
            self.communicator.all_to_all(arrived, sent.contiguous(), received_M, sent_M)
        return arrived

    def reduce_scatter_sum(self, shards_GN: Tensor, what: str) -> None:
        """Replace the local row of `shards_GN`, [ranks, N], by its sum over the group; other rows become garbage."""
        # In place, not into a new tensor: the FP32 gradients of one rank of DeepSeek-V3 take 12.5 GB.
        if self.communicator is not None:
            with self.collective_error_context(what):
                self.communicator.reduce_scatter(shards_GN[self.group_rank], shards_GN)

    def all_gather(self, shards_GN: Tensor, what: str) -> None:
        """Fill row i of `shards_GN`, [ranks, N], with that of rank i."""
        if self.communicator is not None:
            with self.collective_error_context(what):
                self.communicator.all_gather(shards_GN, shards_GN[self.group_rank])

    def send_and_receive(self, sends: PeerTensors, receives: PeerTensors, what: str) -> None:
        """Exchange P2P messages with some ranks of the group as one batch."""
        if self.communicator is not None:
            peers = [peer for _, peer in (*sends, *receives)]
            with self._calling(what, peers):
                self.communicator.send_and_receive(sends, receives)

    def all_gather_objects(self, value: T, what: str) -> list[T]:
        """Return the small plain `value` of every rank, in group order."""
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
        """Turn errors of collectives that a library runs over this group into `CollectiveError`."""
        if self.communicator is None:
            return nullcontext()
        return self._calling(what, self.ranks)

    @contextmanager
    def _calling(self, what: str, peers: Sequence[int]) -> Iterator[None]:
        watched = nullcontext() if self.watchdog is None else self.watchdog.watch_call(what, peers)
        with collective_error_context(self.rank, what, peers, self.timeout), watched:
            yield


@dataclass(frozen=True)
class ExpertGroups:
    """Process groups that a token exchange uses."""

    ep: Group
    """Expert-parallel ranks: the all-to-alls of tokens run here."""
    ep_inter_node: Group
    """Ranks of `ep` with the same local rank, one per node: the inter-node all-to-all runs here."""
    ep_intra_node: Group
    """Ranks of `ep` in this node."""

    @staticmethod
    def from_process_groups(
        ep: dist.ProcessGroup | None = None,
        inter_node: dist.ProcessGroup | None = None,
        intra_node: dist.ProcessGroup | None = None,
        timeout: timedelta = _ADOPTED_TIMEOUT,
    ) -> "ExpertGroups":
        """Adopt torch's process groups; without the last two, `ep` (None: the default group) counts as one node.

        On a DeviceMesh of nodes by ranks they are `mesh.get_group("node")` and `mesh.get_group("rank")`. Raises
        `ValueError` unless the position in `ep` is that of the node times the ranks of a node plus the local rank.
        """
        whole = Group.from_process_group(ep, timeout)
        if inter_node is None or intra_node is None:
            return ExpertGroups(whole, Group((whole.rank,), None, whole.rank, timeout), whole)
        between, inside = Group.from_process_group(inter_node, timeout), Group.from_process_group(intra_node, timeout)
        first = between.group_rank * inside.size
        rail = whole.ranks[inside.group_rank :: inside.size]
        if inside.ranks != whole.ranks[first : first + inside.size] or between.ranks != rail:
            parts = f"intra-node {list(inside.ranks)}, inter-node {list(between.ranks)}"
            raise ValueError(f"rank {whole.rank}: {parts} do not divide {list(whole.ranks)} into consecutive nodes")
        return ExpertGroups(whole, between, inside)


@dataclass(frozen=True)
class ProcessGroups(ExpertGroups):
    """All process groups of one rank."""

    topology: Topology
    rank: int
    world: Group
    """All ranks, for tensors on the device that the run computes on."""
    world_cpu: Group
    """All ranks, for tensors on the host: checkpoints, measurements. On a GPU no training step uses it."""
    pp_next: Group
    """Pipeline ranks, for messages to the next rank."""
    pp_prev: Group
    """Pipeline ranks, for messages to the previous rank."""
    dense_dp: Mapping[tuple[int, ...], Group]
    """Groups that sum the gradient of a dense parameter; the key is the pipeline ranks that hold it.

    These and `expert_dp` belong to the communicator that reduces gradients, not to the main thread."""
    expert_dp: Mapping[tuple[int, ...], Group]
    """Groups that sum the gradients of this rank's experts; the keys are those of `dense_dp`."""
    watchdog: Watchdog | None = None
    """Watchdog of all groups except `world_cpu`."""

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
    ) -> "ProcessGroups":
        """Create every group of the grid and keep those of `rank`. Collective over the default group.

        `shared_pp_ranks` are sets of pipeline ranks that share parameters (the same on all ranks), besides each rank
        alone. `group_factory` defaults to gloo. `watchdog` watches all groups except `world_cpu`. Without a default
        group (one process) every group is this rank alone.
        """
        builder = _GroupBuilder(topology, rank, timeout, group_factory or GlooGroupFactory(rank, timeout), watchdog)
        alone = [(pp_rank,) for pp_rank in range(topology.pp)]
        shared = list(dict.fromkeys((*alone, *(tuple(sorted(set(each))) for each in shared_pp_ranks))))
        everyone = tuple(range(topology.world_size))
        # A split like the others, because the default group has the longer timeout of the start.
        world = builder.own("world", lambda _: everyone)
        return ProcessGroups(
            topology=topology,
            rank=rank,
            world=world,
            world_cpu=builder.control(world),
            ep=builder.own("ep", topology.ep_ranks),
            ep_inter_node=builder.own("ep inter-node", topology.ep_inter_node_ranks),
            ep_intra_node=builder.own("ep intra-node", topology.ep_intra_node_ranks),
            # Two groups for one set of ranks: neighbors send to each other at the same moment, and messages of one
            # communicator are matched in order, so that each direction would wait for the other.
            pp_next=builder.own("pp next", topology.pp_ranks, max_ctas=P2P_MAX_CTAS),
            pp_prev=builder.own("pp prev", topology.pp_ranks, max_ctas=P2P_MAX_CTAS),
            dense_dp=builder.reducing("dense gradients", topology.dense_dp_ranks, shared),
            expert_dp=builder.reducing("expert gradients", topology.expert_dp_ranks, shared),
            watchdog=watchdog,
        )


P2P_MAX_CTAS = 4
"""Most thread blocks of a P2P message between pipeline stages."""
# A receive that is posted ahead keeps its SMs while it waits, and 4 are enough for one InfiniBand port (50 GB/s).
REDUCE_MAX_CTAS = 8
"""Most thread blocks of a reduce-scatter or all-gather of ZeRO-1."""
# These run while the backward computes. Left alone, NCCL may take 16 to 32 of the 132 SMs.

_Parts = tuple[tuple[int, ...], ...]


class _GroupBuilder:
    """Creates the groups of `ProcessGroups` in the same order on every rank."""

    def __init__(
        self, topology: Topology, rank: int, timeout: timedelta, group_factory: GroupFactory, watchdog: Watchdog | None
    ) -> None:
        self._topology, self._rank, self._timeout, self._factory = topology, rank, timeout, group_factory
        self._watchdog = watchdog
        self._reducing: dict[_Parts, Collectives | None] = {}

    def control(self, world: Group) -> Group:
        """Create the group of all ranks for tensors on the host."""
        create = partial(self._factory.create_world_cpu, world.ranks, world.communicator)
        return replace(world, communicator=self._create("world (CPU)", world.ranks, create), watchdog=None)

    def own(self, name: str, ranks_of: Callable[[int], tuple[int, ...]], max_ctas: int | None = None) -> Group:
        """Create the groups `ranks_of` every rank and return that of this rank."""
        # One communicator for each user: two threads, or two streams, must not issue collectives on the same one.
        parts = tuple(dict.fromkeys(map(ranks_of, range(self._topology.world_size))))
        return self._group(ranks_of(self._rank), self._split(name, parts, max_ctas))

    def reducing(
        self, name: str, ranks_of: Callable[[int], tuple[int, ...]], shared: Sequence[tuple[int, ...]]
    ) -> dict[tuple[int, ...], Group]:
        """Create the groups that reduce gradients; return those of this rank, by the pipeline ranks that share them."""
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
            # Dense and expert groups of the same ranks share a communicator, since one thread uses both. Every NCCL
            # communicator costs memory: about 10 MB per channel and peer.
            if parts not in self._reducing:
                self._reducing[parts] = self._split(name, parts, REDUCE_MAX_CTAS)
            communicator = self._reducing[parts]
            for pp_ranks in holders:
                if pp_rank in pp_ranks:
                    groups[pp_ranks] = self._group(
                        topology.map_to_pp_ranks(ranks_of(self._rank), pp_ranks), communicator
                    )
        return groups

    def _split(self, name: str, parts: _Parts, max_ctas: int | None) -> Collectives | None:
        # A group of one rank has nothing to send and gets no communicator.
        several = [ranks for ranks in parts if len(ranks) > 1]
        everyone = range(self._topology.world_size if several else 1)
        return self._create(name, everyone, lambda: self._factory.split_group(name, several, max_ctas))

    def _create(self, name: str, ranks: Sequence[int], builder: Callable[[], Collectives | None]) -> Collectives | None:
        """Create groups, which is collective over `ranks`, under the watchdog."""
        if len(ranks) == 1:
            return None
        if self._watchdog is None:
            return builder()
        # NCCL splits block the host inside the library, where neither torch's watchdog nor a timeout ends them.
        with self._watchdog.watch_call(f"creating the process groups {name!r}", ranks):
            return builder()

    def _group(self, ranks: tuple[int, ...], communicator: Collectives | None) -> Group:
        return Group(ranks, communicator if len(ranks) > 1 else None, self._rank, self._timeout, self._watchdog)


def _disjoint(sets: Iterable[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Distribute `sets` over lists of disjoint sets: one split creates the groups of one list."""
    lists: list[list[tuple[int, ...]]] = []
    for each in sets:
        fitting = (found for found in lists if not any(set(each) & set(other) for other in found))
        chosen = next(fitting, None)
        if chosen is None:
            lists.append([each])
        else:
            chosen.append(each)
    return lists
