"""Sizes of a rehearsed dispatch with balanced routing, consistent on both ends of every message.

Letters: P ranks of an expert-parallel group, N nodes of G ranks each, E experts in total, L experts per rank, T tokens
per rank, K experts per token.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ....trainer.config import RunConfig
from ...planner.exchange_time import expected_destinations_per_token

CountArray = NDArray[np.int64]


@dataclass(frozen=True)
class BalancedRouting:
    """Numbers of tokens that the ranks of a group send to each other if every expert is chosen equally often.

    The model limits a token's experts to groups, so a token is sent to fewer ranks and nodes than it has experts:
    `expected_destinations_per_token` on average. The remainder of a division goes to different destinations for each
    rank, so that the received numbers are even too.
    """

    ranks: int
    nodes: int
    experts: int
    tokens: int
    top_k: int
    mean_ranks_per_token: float
    """Mean number of ranks that hold an expert of a token."""
    mean_nodes_per_token: float

    @staticmethod
    def from_config(config: RunConfig) -> "BalancedRouting":
        """Return the routing of a run's micro-batches."""
        topology, model = config.topology, config.model
        return BalancedRouting(
            ranks=topology.ep,
            nodes=topology.nodes_per_ep_group,
            experts=model.n_routed_experts,
            tokens=config.schedule.micro_batch_size * config.training.sequence_length,
            top_k=model.num_experts_per_tok,
            mean_ranks_per_token=expected_destinations_per_token(model, topology.ep),
            mean_nodes_per_token=expected_destinations_per_token(model, topology.nodes_per_ep_group),
        )

    @cached_property
    def rows_by_expert(self) -> CountArray:
        """(token, expert) pairs of each rank by the rank of the expert and the expert, [P, P, L]."""
        return _spread(self.tokens * self.top_k, self.ranks, self.experts).reshape(self.ranks, self.ranks, -1)

    @cached_property
    def tokens_by_rank(self) -> CountArray:
        """Tokens of each rank that have at least one expert on each rank, [P, P]."""
        return self._spread_tokens(self.rows_by_expert, self.mean_ranks_per_token)

    @cached_property
    def tokens_by_node(self) -> CountArray:
        """Tokens of each rank that have at least one expert on each node, [P, N]."""
        visits_PNG = self.tokens_by_rank.reshape(self.ranks, self.nodes, -1)
        return self._spread_tokens(visits_PNG, self.mean_nodes_per_token)

    def _spread_tokens(self, parts_PDL: CountArray, mean_destinations: float) -> CountArray:
        """Return even counts by rank and destination, [P, D], that are possible with the counts of its parts."""
        even_PD = _spread(round(self.tokens * mean_destinations), *parts_PDL.shape[:2])
        return np.clip(even_PD, parts_PDL.max(axis=2), np.minimum(self.tokens, parts_PDL.sum(axis=2)))

    def flat_exchange_sizes(self, rank: int) -> list[int]:
        """Return the sizes that `FlatExchange` reads, [2P + L + 2].

        Rows sent to and received from each rank, rows by expert, token counts of ranks and of nodes.
        """
        return _numbers(
            self.rows_by_expert[rank].sum(axis=1),
            self.rows_by_expert[:, rank].sum(axis=1),
            self.rows_by_expert[:, rank].sum(axis=0),
            self.tokens_by_rank[rank].sum(keepdims=True),
            self.tokens_by_node[rank].sum(keepdims=True),
        )

    def two_hop_exchange_sizes(self, rank: int) -> list[int]:
        """Return the sizes that `TwoHopExchange` reads, [2N + 2G + L + 1].

        Tokens to and from each node on this rank's rail, rows forwarded to and received from each rank of its node,
        rows by expert, token count of ranks.
        """
        size = self.ranks // self.nodes
        node, place = divmod(rank, size)
        rail_N = np.arange(self.nodes) * size + place
        own_G = slice(node * size, (node + 1) * size)
        return _numbers(
            self.tokens_by_node[rank],
            self.tokens_by_node[rail_N, node],
            self.tokens_by_rank[rail_N, own_G].sum(axis=0),
            self.tokens_by_rank[:, rank].reshape(self.nodes, size).sum(axis=0),
            self.rows_by_expert[:, rank].sum(axis=0),
            self.tokens_by_rank[rank].sum(keepdims=True),
        )


def _spread(total: int, ranks: int, places: int) -> CountArray:
    """Split `total` evenly over `places` for each rank, [ranks, places]; each rank's remainder starts elsewhere."""
    each, more = divmod(total, places)
    first_P1 = np.arange(ranks)[:, None] * more
    return each + ((np.arange(places)[None, :] - first_P1) % places < more).astype(np.int64)


def _numbers(*parts: CountArray) -> list[int]:
    return [int(number) for part in parts for number in part]
