"""Figures of a cluster that a price needs: what is not known is refused, and never free."""

from __future__ import annotations

from ...comm.errors import Problem, Refused
from ...trainer.costs.cluster import ClusterConfig


def bytes_a_second(cluster: ClusterConfig, name: str, gigabytes: float | None, need: str) -> float:
    """Of `gigabytes`, the value of `cluster.<name>` in 10^9 bytes a second. Raises `Refused` where it is null.

    `need` says what cannot be priced without.
    """
    if gigabytes is None:
        remedy = f"is not known for {cluster.name}, and {need} cannot be priced without; write a figure"
        raise Refused([Problem(f"cluster.{name}", None, remedy)])
    return gigabytes * 1e9


def evidence_of(cluster: ClusterConfig, name: str) -> str:
    """The evidence class of a figure, as its source says; `assumed` where it says none."""
    return cluster.sources.get(name, "assumed").partition(":")[0]
