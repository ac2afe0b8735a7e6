"""Which rank does what: pure arithmetic on the grid pipeline × expert-data × expert, and the link between two ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from .errors import Problem

_MOST_RANKS, _MOST_STAGES = 2**20, 1024


class LinkType(StrEnum):
    """The wire between two ranks. The names are an H800 node's, also where both ranks are processes on one CPU."""

    LOOPBACK = "loopback"  # a rank to itself: a copy in its own memory
    NVLINK = "nvlink"  # two ranks of one node
    INFINIBAND = "infiniband"  # two nodes


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The grid of ranks. `ep` is innermost, so an expert-parallel group sits on consecutive GPUs.

    rank = (pp_rank * edp + edp_rank) * ep + ep_rank
    """

    pp: int = 1
    """Pipeline-parallel ranks."""
    edp: int = 1
    """Expert-data-parallel ranks: how many replicas of each expert there are."""
    ep: int = 1
    """Expert-parallel ranks: over how many ranks the experts of one replica are spread."""
    gpus_per_node: int = 8
    """GPUs that share NVLink."""

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.pp * self.edp * self.ep

    @property
    def dp(self) -> int:
        """Data-parallel ranks as attention and the dense layers see them: each of them reads its own samples."""
        return self.edp * self.ep

    def ep_rank(self, rank: int) -> int:
        """Position of `rank` in its expert-parallel group."""
        return rank % self.ep

    def edp_rank(self, rank: int) -> int:
        """Position of `rank` among the replicas of its experts."""
        return rank // self.ep % self.edp

    def pp_rank(self, rank: int) -> int:
        """Pipeline position of `rank`."""
        return rank // (self.ep * self.edp)

    def dp_rank(self, rank: int) -> int:
        """Position of `rank` among those that hold the same dense parameters; it picks the samples the rank reads."""
        return rank % self.dp

    def ep_ranks(self, rank: int) -> tuple[int, ...]:
        """The ranks over which the experts that `rank` can reach are spread, in order of expert."""
        first = rank - self.ep_rank(rank)
        return tuple(range(first, first + self.ep))

    @property
    def ep_ranks_per_node(self) -> int:
        """How many ranks of an expert-parallel group share a node."""
        return min(self.ep, self.gpus_per_node)

    @property
    def nodes_per_ep_group(self) -> int:
        """Over how many nodes an expert-parallel group is spread."""
        return self.ep // self.ep_ranks_per_node

    def ep_intra_node_ranks(self, rank: int) -> tuple[int, ...]:
        """The ranks of its expert-parallel group in the node of `rank`."""
        first = rank - self.ep_rank(rank) % self.ep_ranks_per_node
        return tuple(range(first, first + self.ep_ranks_per_node))

    def ep_inter_node_ranks(self, rank: int) -> tuple[int, ...]:
        """The ranks of its expert-parallel group with the place of `rank` in their nodes (the same rail)."""
        return self.ep_ranks(rank)[self.ep_rank(rank) % self.ep_ranks_per_node :: self.ep_ranks_per_node]

    def pp_ranks(self, rank: int) -> tuple[int, ...]:
        """The pipeline of `rank`: one rank a stage, in order, at the same place in their data-parallel groups."""
        return tuple(range(self.dp_rank(rank), self.world_size, self.dp))

    def map_to_pp_ranks(self, ranks: Sequence[int], pp_ranks: Sequence[int]) -> tuple[int, ...]:
        """`ranks`, all of one pipeline rank, moved to each of `pp_ranks`: those that hold the same parameters."""
        return tuple(pp_rank * self.dp + self.dp_rank(rank) for pp_rank in pp_ranks for rank in ranks)

    def expert_dp_ranks(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold the same experts as `rank`."""
        first = rank - self.dp_rank(rank) + self.ep_rank(rank)
        return tuple(first + replica * self.ep for replica in range(self.edp))

    def dense_dp_ranks(self, rank: int) -> tuple[int, ...]:
        """The ranks that hold the same dense parameters as `rank`."""
        first = rank - self.dp_rank(rank)
        return tuple(range(first, first + self.dp))

    def link_type(self, source: int, target: int) -> LinkType:
        """The wire that a message from `source` to `target` crosses."""
        if source == target:
            return LinkType.LOOPBACK
        same_node = source // self.gpus_per_node == target // self.gpus_per_node
        return LinkType.NVLINK if same_node else LinkType.INFINIBAND

    def problems(self) -> Iterator[Problem]:
        """What is impossible about this grid on its own."""
        for name in ("pp", "edp", "ep", "gpus_per_node"):
            value: int = self.__dict__[name]
            if value < 1:
                yield Problem(name, value, "must be at least 1")
            elif value > (most := _MOST_STAGES if name == "pp" else _MOST_RANKS):
                yield Problem(name, value, f"must be at most {most}: no cluster has more")
        if min(self.ep, self.gpus_per_node) >= 1 and max(self.ep, self.gpus_per_node) % self.ep_ranks_per_node:
            hint = f"must divide gpus_per_node = {self.gpus_per_node} or be a multiple of it: groups fill nodes evenly"
            yield Problem("ep", self.ep, hint, ("gpus_per_node",))
