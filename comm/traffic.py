"""Bytes that crossed each kind of link, counted where they are sent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from .groups import ExpertGroups, Group
from .topology import LinkType, Topology


class TrafficKind(StrEnum):
    """Use of bytes on the wire."""

    PAYLOAD = "payload"  # rows and their scales
    METADATA = "metadata"  # expert numbers, gate weights, sizes


@dataclass
class TrafficCounter:
    """Counter of the bytes that one rank sends, by operation, kind and link."""

    topology: Topology
    rank: int
    bytes_sent: dict[tuple[str, TrafficKind, LinkType], int] = field(default_factory=dict)

    @staticmethod
    def by_nodes(groups: ExpertGroups) -> "TrafficCounter":
        """Return a counter for nodes of as many consecutive ranks as `groups` has in this node."""
        return TrafficCounter(Topology(gpus_per_node=groups.ep_intra_node.size), groups.ep.rank)

    def count(self, operation: str, kind: TrafficKind, group: Group, bytes_per_peer: Sequence[int]) -> None:
        """Add what `operation` sends from this rank to each rank of `group`, in the group's order."""
        for peer, size in zip(group.ranks, bytes_per_peer, strict=True):
            key = (operation, kind, self.topology.link_type(self.rank, peer))
            self.bytes_sent[key] = self.bytes_sent.get(key, 0) + size

    def reset(self) -> None:
        """Count from zero again."""
        self.bytes_sent.clear()

    def bytes_by_link(self, kind: TrafficKind | None = None, operation: str | None = None) -> Mapping[LinkType, int]:
        """Return the bytes sent over each type of link, of one kind or both, of one operation or all."""
        totals = dict.fromkeys(LinkType, 0)
        for (counted, of_kind, link), size in self.bytes_sent.items():
            if kind in (None, of_kind) and operation in (None, counted):
                totals[link] += size
        return totals
