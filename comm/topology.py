"""Topology: arithmetic on the rank grid pipeline x expert-data x expert, and the link between two ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from typing_extensions import override

from .errors import Problem
from .files.ranges import CheckedConfig, between

_NO_CLUSTER = ", more than any cluster has"


class LinkType(StrEnum):
    """Link between two ranks, named as in an H800 cluster, also if both ranks are processes on one CPU."""

    LOOPBACK = "loopback"  # a rank to itself: a copy in its own memory
    NVLINK = "nvlink"  # two ranks of one node
    INFINIBAND = "infiniband"  # two nodes


@dataclass(frozen=True, kw_only=True)
class Topology(CheckedConfig):
    """The grid of ranks: rank = (pp_rank * edp + edp_rank) * ep + ep_rank."""

    # `ep` is innermost, so that an expert-parallel group is on consecutive GPUs and spans as few nodes as possible: its
    # all-to-alls move the most bytes.

    pp: int = between(1, 1024, 1, most_reason=_NO_CLUSTER)
    """Pipeline-parallel ranks."""
    edp: int = between(1, 2**20, 1, most_reason=_NO_CLUSTER)
    """Expert-data-parallel ranks: replicas of each expert."""
    ep: int = between(1, 2**20, 1, most_reason=_NO_CLUSTER)
    """Expert-parallel ranks: the ranks that share one replica of the experts."""
    gpus_per_node: int = between(1, 2**20, 8, most_reason=_NO_CLUSTER)
    """GPUs that share NVLink."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pp * self.edp * self.ep

    @property
    def dp(self) -> int:
        """Data-parallel ranks of attention and dense layers; each reads different samples."""
        return self.edp * self.ep

    def ep_rank(self, rank: int) -> int:
        """Return the position of `rank` in its expert-parallel group."""
        return rank % self.ep

    def edp_rank(self, rank: int) -> int:
        """Return the position of `rank` among the replicas of its experts."""
        return rank // self.ep % self.edp

    def pp_rank(self, rank: int) -> int:
        """Return the pipeline rank of `rank`."""
        return rank // (self.ep * self.edp)

    def dp_rank(self, rank: int) -> int:
        """Return the position of `rank` among the replicas of its dense parameters, which selects its samples."""
        return rank % self.dp

    def ep_ranks(self, rank: int) -> tuple[int, ...]:
        """Return the ranks of the expert-parallel group of `rank`, in order of expert."""
        first = rank - self.ep_rank(rank)
        return tuple(range(first, first + self.ep))

    @property
    def ep_ranks_per_node(self) -> int:
        """Ranks of an expert-parallel group in one node."""
        return min(self.ep, self.gpus_per_node)

    @property
    def nodes_per_ep_group(self) -> int:
        """Nodes of an expert-parallel group."""
        return self.ep // self.ep_ranks_per_node

    def ep_intra_node_ranks(self, rank: int) -> tuple[int, ...]:
        """Return the ranks of the expert-parallel group in the node of `rank`."""
        first = rank - self.ep_rank(rank) % self.ep_ranks_per_node
        return tuple(range(first, first + self.ep_ranks_per_node))

    def ep_inter_node_ranks(self, rank: int) -> tuple[int, ...]:
        """Return the ranks of the expert-parallel group with the local rank of `rank` (the same rail), one per node."""
        return self.ep_ranks(rank)[self.ep_rank(rank) % self.ep_ranks_per_node :: self.ep_ranks_per_node]

    def pp_ranks(self, rank: int) -> tuple[int, ...]:
        """Return the pipeline ranks of `rank` in order, all with the same data-parallel rank."""
        return tuple(range(self.dp_rank(rank), self.world_size, self.dp))

    def map_to_pp_ranks(self, ranks: Sequence[int], pp_ranks: Sequence[int]) -> tuple[int, ...]:
        """Return the ranks that correspond to `ranks`, all of one pipeline rank, on each of `pp_ranks`."""
        return tuple(pp_rank * self.dp + self.dp_rank(rank) for pp_rank in pp_ranks for rank in ranks)

    def expert_dp_ranks(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that hold the same experts as `rank`."""
        first = rank - self.dp_rank(rank) + self.ep_rank(rank)
        return tuple(first + replica * self.ep for replica in range(self.edp))

    def dense_dp_ranks(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that hold the same dense parameters as `rank`."""
        first = rank - self.dp_rank(rank)
        return tuple(range(first, first + self.dp))

    def link_type(self, source: int, target: int) -> LinkType:
        """Return the link that a message from `source` to `target` crosses."""
        if source == target:
            return LinkType.LOOPBACK
        same_node = source // self.gpus_per_node == target // self.gpus_per_node
        return LinkType.NVLINK if same_node else LinkType.INFINIBAND

    @override
    def rule_problems(self) -> Iterator[Problem]:
        # Uneven nodes would need another local rank on each, and `two_hop` sends along rails of equal local ranks.
        if min(self.ep, self.gpus_per_node) >= 1 and max(self.ep, self.gpus_per_node) % self.ep_ranks_per_node:
            hint = f"must divide gpus_per_node = {self.gpus_per_node} or be a multiple of it, to fill nodes evenly"
            yield Problem("ep", self.ep, hint, ("gpus_per_node",))
