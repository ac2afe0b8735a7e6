"""Seconds of a token exchange: bytes across InfiniBand and NVLink, each token once a node, then once a rank.

Letters: T tokens, D hidden, N nodes and P ranks of the expert-parallel group, G groups of experts, M groups a token may
visit, K experts it visits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from math import comb

from ...comm.refusal import Problem, Refused
from ...trainer.costs.cluster import ClusterConfig
from ...trainer.model.config import ModelConfig
from .operations import Shape
from .recipe import Precision, Recipe
from .tables import Coverage, Table


class Exchange(StrEnum):
    """The four operations of `comm.exchange.TokenExchange`."""

    DISPATCH = "dispatch"
    COMBINE = "combine"
    COMBINE_BACKWARD = "combine_backward"  # a dispatch of gradients along the cached layout
    DISPATCH_BACKWARD = "dispatch_backward"  # a combine

    @property
    def towards_experts(self) -> bool:
        """Rows go to the experts, in FP8 if computing is; sums of them come back in BF16 (report §3.3)."""
        return self in (Exchange.DISPATCH, Exchange.COMBINE_BACKWARD)


@cache
def expected_visits(model: ModelConfig, places: int) -> float:
    """Of `places` equal shares of the experts, how many a token visits on average if routing is uniform.

    M of G groups, then K experts of these. A share is several whole groups, or a part of one.
    """
    groups, chosen, experts, top_k = model.groups, model.top_k_groups, model.experts, model.top_k
    group_size, share = experts // groups, experts // places
    reachable = chosen * group_size

    def missed(candidates: int) -> float:
        """The probability that none of `candidates` reachable experts is among the K."""
        return comb(reachable - candidates, top_k) / comb(reachable, top_k) if candidates <= reachable else 0.0

    if share <= group_size:
        return places * chosen / groups * (1 - missed(share))
    inside = share // group_size
    hit = 0.0
    for j in range(1, min(inside, chosen) + 1):
        chance = comb(inside, j) * comb(groups - inside, chosen - j) / comb(groups, chosen)
        hit += chance * (1 - missed(j * group_size))
    return places * hit


@dataclass(frozen=True)
class Travel:
    """One exchange: how long it takes beside computing and alone, and before that the waits for other ranks."""

    name: str
    beside: float
    alone: float
    syncs: tuple[float, ...] = (0.0,)
    """Of the layers of a chunk in the order in which they run, again from the first after the last."""


@dataclass(frozen=True)
class Wire:
    """Prices exchanges of an expert-parallel group on one cluster."""

    cluster: ClusterConfig
    recipe: Recipe
    table: Table
    coverage: Coverage
    _priced: dict[tuple[Shape, Exchange], Travel] = field(default_factory=dict)

    def travel(self, shape: Shape, exchange: Exchange) -> Travel:
        """One exchange of one layer and micro-batch; nothing where all experts are on the rank."""
        key = shape, exchange
        if key not in self._priced:
            self._priced[key] = self._price(shape, exchange)
        return self._priced[key]

    def bytes(self, shape: Shape, exchange: Exchange) -> tuple[float, float]:
        """What one rank sends: across InfiniBand, and across NVLink at the nodes that forward it."""
        model, ranks = shape.model, shape.expert_ranks
        nodes = max(1, ranks // self.cluster.gpus_per_node)
        row = self._row_bytes(model, exchange)
        places = min(ranks, model.experts)
        remote = expected_visits(model, nodes) * (nodes - 1) / nodes
        forwarded = expected_visits(model, places) * (1 - 1 / min(ranks, self.cluster.gpus_per_node))
        return shape.tokens * row * remote, shape.tokens * row * forwarded

    def _row_bytes(self, model: ModelConfig, exchange: Exchange) -> float:
        if self.recipe.precision is Precision.FP8 and exchange.towards_experts:
            return model.hidden * (1 + 4 / 128)  # with an FP32 scale for 128 elements
        return model.hidden * max(2, self.recipe.precision.bytes)

    def _price(self, shape: Shape, exchange: Exchange) -> Travel:
        measured = self._calibrated(shape, exchange)
        if measured is not None:
            return measured
        if shape.expert_ranks == 1:
            return Travel(exchange.value, 0.0, 0.0)
        rows = [row for row in self.table.of("sync", "overlapped") if row.name == exchange.value]
        syncs = tuple(row.seconds for row in sorted(rows, key=lambda row: row.outputs)) or (0.0,)
        alone = self._alone(shape, exchange) * (1 + self.recipe.skew) / self.recipe.links
        beside = alone * self._contention(exchange)
        self.coverage.add("measured" if rows else "published", beside + sum(syncs) / len(syncs))
        return Travel(exchange.value, beside, alone, syncs)

    def _calibrated(self, shape: Shape, exchange: Exchange) -> Travel | None:
        """As `shoestring calibrate` measured it whole. On a CPU it hides behind nothing: its core computes."""
        row = self.table.find(
            "phase", exchange.value, f"{shape.micro_batch}x{shape.sequence_length}/{shape.expert_ranks}"
        )
        if row is None:
            return None
        self.coverage.add(row.evidence, row.seconds)
        return Travel(exchange.value, math.inf, row.seconds)

    def _alone(self, shape: Shape, exchange: Exchange) -> float:
        """The slower of both links: forwarding inside the nodes goes on while more arrives."""
        cluster, kind = self.cluster, _kind(exchange)
        infiniband, nvlink = self.bytes(shape, exchange)
        seconds = [nvlink / self._rate(kind, cluster.gpus_per_node, cluster.nvlink_gbps, "nvlink_gbps")]
        if infiniband > 0:
            rate = self._rate(kind, shape.expert_ranks, cluster.infiniband_gbps, "infiniband_gbps")
            seconds.append(infiniband / rate)
        return max(seconds)

    def _rate(self, kind: str, ranks: int, link: float | None, name: str) -> float:
        """Bytes a second: those that kernels reached on this cluster, else the link's."""
        measured = self._measured_rate(kind, ranks) if self.table.name == self.cluster.name else None
        if measured is not None:
            return measured
        if link is None:
            remedy = f"is not known for {self.cluster.name}, and {ranks} expert-parallel ranks need it"
            raise Refused([Problem(f"cluster.{name}", None, remedy)])
        return link * 1e9

    def _measured_rate(self, kind: str, ranks: int) -> float | None:
        """Bytes a second that cross the link, in the measurement of the group that is most alike."""
        size = self.cluster.gpus_per_node
        rows = [row for precision in Precision for row in self.table.of("exchange", "alone", precision.value)]
        rows = [row for row in rows if row.name == kind and (row.inputs <= size) == (ranks <= size)]
        # Two nodes are left out: there the published kernels are held up by NVLink, not by InfiniBand.
        rows = [row for row in rows if row.inputs <= size or row.inputs > 2 * size]
        if not rows:
            return None
        row = min(rows, key=lambda row: abs(row.inputs - ranks))
        nodes = max(1, row.inputs // size)
        return row.value * 1e9 * ((nodes - 1) / nodes if nodes > 1 else 1.0)  # logical: tokens that stay are counted

    def _contention(self, exchange: Exchange) -> float:
        """By how much computing beside it slows an exchange down: the trace's kernels against the same ones alone."""
        names = (self.table.find("exchange", exchange.value, "overlapped", precision.value) for precision in Precision)
        row = next((row for row in names if row is not None), None)
        if row is None:
            return 1.0
        traced = Wire(replace(self.cluster, gpus_per_node=_TRACED_NODE), Recipe(), self.table, Coverage())
        shape = Shape(_TRACED_MODEL, row.tokens, 1, row.inputs)
        infiniband, nvlink = traced.bytes(shape, exchange)
        rates = [traced._measured_rate(_kind(exchange), ranks) for ranks in (row.inputs, _TRACED_NODE)]
        assert rates[0] is not None
        assert rates[1] is not None
        return row.seconds / max(infiniband / rates[0], nvlink / rates[1])


def _kind(exchange: Exchange) -> str:
    return "dispatch" if exchange.towards_experts else "combine"


_TRACED_NODE = 8
"""GPUs of a node in the trace and in the published kernels' measurements, whatever the cluster at hand has."""
_TRACED_MODEL = ModelConfig(hidden=7168, experts=256, groups=8, top_k_groups=4, top_k=8)
