"""Metrics of one step: load balance of the experts, bytes sent, and where the tokens went."""

from typing import TYPE_CHECKING

from ...comm.traffic import TrafficKind
from ...parallelism.zero.reduce import ALL_GATHER, REDUCE_SCATTER
from ..telemetry.events import JSON

if TYPE_CHECKING:
    from ...comm.topology import Topology
    from ...comm.traffic import TrafficCounter
    from ..config import RunConfig
    from .step import StepResult


def step_metrics(
    config: "RunConfig",
    result: "StepResult",
    traffic: "TrafficCounter",
    between_replicas: "TrafficCounter",
) -> dict[str, JSON]:
    """Return the metrics of a `StepLogged`; `traffic` and `between_replicas` as in `Reporter.report_step`."""
    return {
        # DeepEP does not report what it sends.
        **_traffic(traffic if config.exchange.name != "deepep" else None, between_replicas),
        **_load_balance(result, config.topology),
        **_routing(result),
    }


def _load_balance(result: "StepResult", topology: "Topology") -> dict[str, JSON]:
    """Return the loads of experts, ranks and nodes of each MoE layer in this step, and the range of the routing biases.

    `max_violation` (arXiv 2408.15664) is the largest load over the mean load, minus 1; 0 is perfect balance. The load
    of a rank is the sum over its experts and over the replicas of the expert-parallel group; that of a node is the
    sum over its ranks.
    """
    values: dict[str, JSON] = {}
    members = {"load": None, "load/ranks": topology.ep, "load/nodes": topology.nodes_per_ep_group}
    worst = dict.fromkeys(members, 0.0)
    for name, counts_E in result.totals.tokens_per_expert_E.items():
        for kind, count in members.items():
            load = counts_E if count is None else counts_E.view(count, -1).sum(dim=1)
            violation = float(load.max() * load.numel() / load.sum()) - 1
            worst[kind] = max(worst[kind], violation)
            values[f"{kind}/{name}/max_violation"] = violation
        values[f"tokens_per_expert/{name}"] = counts_E.tolist()
    if result.totals.tokens_per_expert_E:
        values |= {f"{kind}/max_violation": violation for kind, violation in worst.items()}
        values["bias/min"], values["bias/max"] = result.router_bias_range
    return values


def _traffic(exchange: "TrafficCounter | None", between_replicas: "TrafficCounter") -> dict[str, JSON]:
    """Return the bytes that rank 0 sent in this step by link.

    They are those of the token exchange, all and the rows alone, and those of gradients and weights that it sent to
    ranks with the same parameters.
    """
    sizes = {}
    if exchange is not None:
        sizes["all_to_all_bytes"] = exchange.bytes_by_link()
        sizes["all_to_all_payload_bytes"] = exchange.bytes_by_link(TrafficKind.PAYLOAD)
    sizes["reduce_scatter_bytes"] = between_replicas.bytes_by_link(operation=REDUCE_SCATTER)
    sizes["all_gather_bytes"] = between_replicas.bytes_by_link(operation=ALL_GATHER)
    return {f"{kind}/{link}": size for kind, by_link in sizes.items() for link, size in by_link.items()}


def _routing(result: "StepResult") -> dict[str, JSON]:
    """Return how many nodes and ranks each token is sent to, mean over tokens and MoE layers.

    The report sends a token to at most 4 nodes, and could select 3.2 experts per node at the same cost (§3.2.2).
    """
    visits = result.totals.token_counts
    if not visits.tokens:
        return {}
    return {
        "routing/nodes_per_token": visits.token_node_pairs / visits.tokens,
        "routing/ranks_per_token": visits.token_rank_pairs / visits.tokens,
        "routing/experts_per_token_and_node": visits.token_expert_pairs / visits.token_node_pairs,
    }
