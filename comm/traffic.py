"""Bytes that crossed each kind of link, counted where they are sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .groups import Group
from .topology import Link, Topology


@dataclass
class Traffic:
    """Bytes sent by one rank, by operation and link."""

    topology: Topology
    rank: int
    bytes_sent: dict[tuple[str, Link], int] = field(default_factory=dict)

    def count(self, operation: str, group: Group, bytes_per_peer: Sequence[int]) -> None:
        """Add what `operation` sends from this rank to each rank of `group`, in the group's order."""
        for peer, size in zip(group.ranks, bytes_per_peer, strict=True):
            key = (operation, self.topology.link(self.rank, peer))
            self.bytes_sent[key] = self.bytes_sent.get(key, 0) + size

    def clear(self) -> None:
        """Count from zero again."""
        self.bytes_sent.clear()

    def by_link(self) -> Mapping[Link, int]:
        """Bytes sent over each kind of link, all operations together."""
        totals = dict.fromkeys(Link, 0)
        for (_, link), size in self.bytes_sent.items():
            totals[link] += size
        return totals
