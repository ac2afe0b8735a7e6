"""Seconds of a token exchange (all-to-all): bytes over InfiniBand and NVLink.

A token crosses to a node at most once, then to each of its ranks once. An unknown bandwidth is an error, never free.

Letters: T tokens, D hidden, N nodes and P ranks of the expert-parallel group, G groups of experts, M groups a token may
visit, K experts it visits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import comb

from ...comm.errors import ConfigError, Problem
from ...comm.exchange.wire_format import WireFormat
from ...parallelism.pipeline.chunk_walk import ExchangeOperation
from ...trainer.costs.cluster import ClusterConfig
from ...trainer.model.config import ModelConfig
from .kernel_times import EvidenceCoverage, KernelMeasurement, KernelTable, weakest_evidence
from .operations import LayerWorkload
from .recipe import ForecastRecipe


def bytes_per_second(cluster: ClusterConfig, link: str, need: str) -> float:
    """Return the bytes/s of `infiniband`, `nvlink` or `memory` on a cluster. Raises `ConfigError` if it is not known.

    `need` names the operation that needs it, for the message.
    """
    name = f"{link}_gb_per_second"
    gigabytes: float | None = getattr(cluster, name)
    if gigabytes is None:
        hint = f"is not known for {cluster.name}, and {need} cannot be priced without it; set it"
        raise ConfigError([Problem(f"cluster.{name}", None, hint)])
    return gigabytes * 1e9


def cluster_evidence_class(cluster: ClusterConfig, name: str) -> str:
    """Return the evidence class that a figure's source states; `assumed` if it has no source."""
    return cluster.sources.get(name, "assumed").partition(":")[0]


@cache
def expected_destinations_per_token(model: ModelConfig, places: int) -> float:
    """Return how many of `places` equal shares of the experts a token visits on average, with uniform routing.

    Routing chooses M of G groups, then K experts in these. A share is a part of one group, or several whole groups.
    """
    groups, chosen, experts, top_k = model.n_group, model.topk_group, model.n_routed_experts, model.num_experts_per_tok
    group_size, share = experts // groups, experts // places
    reachable = chosen * group_size

    def missed(candidates: int) -> float:
        """Return the probability that none of `candidates` reachable experts is among the K chosen."""
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
class ExchangeTime:
    """Seconds of one exchange, with and without overlapped computing, and of the wait for other ranks before it."""

    name: str
    overlapped_seconds: float
    standalone_seconds: float
    peer_wait_seconds_by_layer: tuple[float, ...] = (0.0,)
    """Waits of a chunk's layers in execution order; further layers start again at the first."""


@dataclass(frozen=True)
class ExchangeTimeModel:
    """Times of the exchanges of an expert-parallel group on one cluster, cached."""

    cluster: ClusterConfig
    recipe: ForecastRecipe
    table: KernelTable
    coverage: EvidenceCoverage

    @cached_property
    def exchange_time(self) -> Callable[[LayerWorkload, ExchangeOperation], ExchangeTime]:
        """Function that returns the time of one exchange of one layer and micro-batch; 0 if no expert is elsewhere."""
        return cache(self._price)

    def bytes_by_link(self, shape: LayerWorkload, exchange: ExchangeOperation) -> tuple[float, float]:
        """Return the bytes that one rank sends over InfiniBand, and over NVLink at the nodes that forward them."""
        model, ranks = shape.model, shape.ep_size
        nodes = max(1, ranks // self.cluster.gpus_per_node)
        row = self._row_bytes(model, exchange)
        if self._is_flat:  # one row per token and expert, no deduplication per node
            inside = min(ranks, self.cluster.gpus_per_node)
            rows = shape.tokens * row * model.num_experts_per_tok
            return rows * (nodes - 1) / nodes, rows * (inside - 1) / ranks
        places = min(ranks, model.n_routed_experts)
        # A token of V3 visits at most 4 of 8 nodes (report §3.2.2), 3.5 of them remote, for 8 experts: counting one row
        # per expert would overstate InfiniBand bytes by about two.
        remote = expected_destinations_per_token(model, nodes) * (nodes - 1) / nodes
        forwarded = expected_destinations_per_token(model, places) * (1 - 1 / min(ranks, self.cluster.gpus_per_node))
        return shape.tokens * row * remote, shape.tokens * row * forwarded

    def _row_bytes(self, model: ModelConfig, exchange: ExchangeOperation) -> float:
        named = getattr(self.recipe.exchange, exchange.value)
        if named == WireFormat.FP8:
            # With an FP32 scale per 128 elements, as in DeepEP V1: 7,392 bytes per token of V3.
            return model.hidden_size * (1 + 4 / 128)
        return model.hidden_size * (2 if named == WireFormat.BF16 else self.recipe.high_precision_bytes)

    @property
    def _is_flat(self) -> bool:
        return self.recipe.exchange.name == "flat"

    def _price(self, shape: LayerWorkload, exchange: ExchangeOperation) -> ExchangeTime:
        calibrated = self.table.find_row("phase", exchange.value, shape.table_name)
        if calibrated is not None:
            self.coverage.add_seconds(calibrated.evidence, calibrated.seconds)
            # Overlapped time is infinite: on a CPU the core that communicates cannot compute.
            return ExchangeTime(exchange.value, math.inf, calibrated.seconds)
        if shape.ep_size == 1:
            return ExchangeTime(exchange.value, 0.0, 0.0)
        if self.table.measured_recipe:
            name = f"{shape.micro_batch_size} sequences of {shape.sequence_length} over {shape.ep_size} ranks"
            hint = f"has no exchange of {name}; calibrate with as many ranks and such a batch"
            raise ConfigError([Problem("cluster.tables", self.table.name, hint)])
        rows = [row for row in self.table.select("sync", "overlapped") if row.name == exchange.value]
        syncs = tuple(row.seconds for row in sorted(rows, key=lambda row: row.outputs)) or (0.0,)
        rate, evidence = self._alone(shape, exchange)
        # An all-to-all ends when its most loaded rank has everything, so it grows with the skew.
        alone = rate * (1 + self.recipe.skew) / self.recipe.link_speed_factor
        overlapped, traced = alone * self._contention(exchange), self._overlapped(exchange)
        if self._is_flat:
            evidence = "assumed"  # the measured kernels send a token to a node once
        elif traced is not None and (traced.tokens, traced.inputs) == (shape.tokens, shape.ep_size):
            evidence = traced.evidence  # the trace contains this exchange
        self.coverage.add_seconds(evidence, overlapped + sum(syncs) / len(syncs))
        return ExchangeTime(exchange.value, overlapped, alone, syncs)

    def _alone(self, shape: LayerWorkload, exchange: ExchangeOperation) -> tuple[float, str]:
        """Return the seconds of the slower link, as forwarding over NVLink overlaps arrival over InfiniBand.

        The second value is the evidence class of the links' rates.
        """
        infiniband, nvlink = self.bytes_by_link(shape, exchange)
        rate, evidence = self._rate(_kind(exchange), self.cluster.gpus_per_node, "nvlink")
        if infiniband == 0:
            return nvlink / rate, evidence
        slower, others = self._rate(_kind(exchange), shape.ep_size, "infiniband")
        return max(nvlink / rate, infiniband / slower), weakest_evidence(evidence, others)

    def _rate(self, kind: str, ranks: int, link: str) -> tuple[float, str]:
        """Return bytes/s that kernels reached on this cluster, else those of the link; and their evidence class."""
        # Published kernels reach 50.6 GB/s over 64 ranks and 45.3 over 128 (DeepEP, logical bytes) on 50 GB/s links.
        # They send a token to a node once, so the figures say nothing about a flat exchange.
        same_cluster = self.table.name == self.cluster.name and not self._is_flat
        row = self._rate_row(kind, ranks) if same_cluster else None
        if row is not None:
            return self._measured_rate(row), row.evidence
        rate = bytes_per_second(self.cluster, link, f"an exchange over {ranks} expert-parallel ranks")
        return rate, cluster_evidence_class(self.cluster, f"{link}_gb_per_second")

    def _measured_rate(self, row: KernelMeasurement) -> float:
        """Return bytes/s over the link."""
        nodes = max(1, row.inputs // self.cluster.gpus_per_node)
        # Published bandwidth is logical: it counts tokens that stay on their node.
        return row.value * 1e9 * ((nodes - 1) / nodes if nodes > 1 else 1.0)

    def _rate_row(self, kind: str, ranks: int) -> KernelMeasurement | None:
        """Return the measurement with the most similar number of ranks."""
        size = self.cluster.gpus_per_node
        # Without two nodes: there NVLink limits the published kernels (43 GB/s over 16 ranks, 58 over 32).
        rows = [
            row
            for row in self.table.select_any_format("exchange", "alone")
            if row.name == kind
            and (row.inputs <= size) == (ranks <= size)
            and (row.inputs <= size or row.inputs > 2 * size)
        ]
        return min(rows, key=lambda row: abs(row.inputs - ranks), default=None)

    def _contention(self, exchange: ExchangeOperation) -> float:
        """Return how much slower an exchange is during computing: the trace's kernels over standalone ones."""
        row = self._overlapped(exchange)
        if row is None:
            return 1.0
        # The ratio is formed for the trace's layout: the report's formats, 64 ranks and nodes of 8 GPUs.
        traced = ExchangeTimeModel(
            replace(self.cluster, gpus_per_node=_TRACED_NODE), ForecastRecipe(), self.table, EvidenceCoverage()
        )
        shape = LayerWorkload(_TRACED_MODEL, row.tokens, 1, row.inputs)
        infiniband, nvlink = traced.bytes_by_link(shape, exchange)
        rates = [traced._rate_row(_kind(exchange), ranks) for ranks in (row.inputs, _TRACED_NODE)]
        if rates[0] is None or rates[1] is None:
            hint = f"has {exchange.value} with overlapped computing but not alone; measure both"
            raise ConfigError([Problem("cluster.tables", self.table.name, hint)])
        return row.seconds / max(infiniband / traced._measured_rate(rates[0]), nvlink / traced._measured_rate(rates[1]))

    def _overlapped(self, exchange: ExchangeOperation) -> KernelMeasurement | None:
        """Return the measurement of the exchange with overlapped computing, or None."""
        rows = self.table.select_any_format("exchange", "overlapped")
        return next((row for row in rows if row.name == exchange.value), None)


def _kind(exchange: ExchangeOperation) -> str:
    return "dispatch" if exchange.sends_to_experts else "combine"


_TRACED_NODE = 8
"""GPUs per node in the trace and in the published measurements, also when the priced cluster has another number."""
_TRACED_MODEL = ModelConfig(hidden_size=7168, n_routed_experts=256, n_group=8, topk_group=4, num_experts_per_tok=8)
