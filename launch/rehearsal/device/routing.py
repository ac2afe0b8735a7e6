"""The numbers that a rehearsed dispatch is told: those of balanced routing, equal on both ends of every message.

Letters: P ranks of an expert-parallel group, N nodes of G ranks each, E experts in all, L experts of one rank, T tokens
of one rank, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ....trainer.config import RunConfig
from ...planner.exchange_time import expected_destinations_per_token

CountArray = NDArray[np.int64]


@dataclass(frozen=True)
class BalancedRouting:
    """How many tokens each rank of a group sends where, when every expert is chosen equally often.

    A token's experts are chosen as the model limits them to groups, so a token visits fewer ranks and nodes than it has
    experts: `expected_destinations_per_token` of them on average. What is left of a division goes to another place for each rank, so
    that what arrives is even, too.
    """

    ranks: int
    nodes: int
    experts: int
    tokens: int
    top_k: int
    mean_ranks_per_token: float
    """Ranks that hold an expert of a token, on average."""
    mean_nodes_per_token: float

    @staticmethod
    def from_config(config: RunConfig) -> BalancedRouting:
        """Return that of the micro-batches of a run."""
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
        """(token, expert) pairs of each rank, by expert."""
        return _spread(self.tokens * self.top_k, self.ranks, self.experts)

    @cached_property
    def tokens_by_rank(self) -> CountArray:
        """Tokens of each rank that have at least one expert on each rank."""
        copies_PPL = self.rows_by_expert.reshape(self.ranks, self.ranks, -1)
        even_PP = _spread(round(self.tokens * self.mean_ranks_per_token), self.ranks, self.ranks)
        most_PP = np.minimum(self.tokens, copies_PPL.sum(axis=2))
        return np.clip(even_PP, copies_PPL.max(axis=2), most_PP)

    @cached_property
    def tokens_by_node(self) -> CountArray:
        """Tokens of each rank that have at least one expert in each node."""
        visits_PNG = self.tokens_by_rank.reshape(self.ranks, self.nodes, -1)
        even_PN = _spread(round(self.tokens * self.mean_nodes_per_token), self.ranks, self.nodes)
        most_PN = np.minimum(self.tokens, visits_PNG.sum(axis=2))
        return np.clip(even_PN, visits_PNG.max(axis=2), most_PN)

    def flat_exchange_sizes(self, rank: int) -> list[int]:
        """Return what `FlatExchange` reads, [2P + L + 2]: sent, received, rows by expert, visits of ranks and nodes."""
        copies_PPL = self.rows_by_expert.reshape(self.ranks, self.ranks, -1)
        parts = (
            copies_PPL[rank].sum(axis=1),
            copies_PPL[:, rank].sum(axis=1),
            copies_PPL[:, rank].sum(axis=0),
            self.tokens_by_rank[rank].sum(keepdims=True),
            self.tokens_by_node[rank].sum(keepdims=True),
        )
        return _numbers(parts)

    def two_hop_exchange_sizes(self, rank: int) -> list[int]:
        """Return what `TwoHopExchange` reads, [2N + 2G + L + 1].

        Tokens to and from each node on this rank's rail, rows that it forwards to each rank of its node and gets from
        it, rows by expert, visits of ranks.
        """
        size = self.ranks // self.nodes
        node, place = divmod(rank, size)
        rail_N = np.arange(self.nodes) * size + place
        own_G = slice(node * size, (node + 1) * size)
        parts = (
            self.tokens_by_node[rank],
            self.tokens_by_node[rail_N, node],
            self.tokens_by_rank[rail_N, own_G].sum(axis=0),
            self.tokens_by_rank[:, rank].reshape(self.nodes, size).sum(axis=0),
            self.rows_by_expert.reshape(self.ranks, self.ranks, -1)[:, rank].sum(axis=0),
            self.tokens_by_rank[rank].sum(keepdims=True),
        )
        return _numbers(parts)


def _spread(total: int, ranks: int, places: int) -> CountArray:
    """[ranks, places]: `total` of each rank over places, one more from another place on for each rank."""
    each, more = divmod(total, places)
    first_P1 = np.arange(ranks)[:, None] * more
    return each + ((np.arange(places)[None, :] - first_P1) % places < more).astype(np.int64)


def _numbers(parts: tuple[CountArray, ...]) -> list[int]:
    return [int(number) for part in parts for number in part]
