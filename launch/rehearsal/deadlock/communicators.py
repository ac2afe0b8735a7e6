"""Calls of the rehearsed ranks, grouped by communicator, in the order of each rank's host."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..findings import format_ranks
from ..log import CollectiveRecord, P2PBatchRecord, P2POpRecord, RankLog


@dataclass(frozen=True)
class Communicator:
    """Process group, identified by its name and its ranks."""

    group: str
    ranks: tuple[int, ...]

    @staticmethod
    def from_event(event: CollectiveRecord | P2PBatchRecord) -> Communicator:
        """Return the communicator that an event uses."""
        return Communicator(event.group, event.ranks)

    def rehearsed_members(self, rehearsed: Iterable[int]) -> list[int]:
        """Return the members among the `rehearsed` ranks, ascending."""
        return sorted(set(self.ranks).intersection(rehearsed))

    def __hash__(self) -> int:
        return hash((self.group, self.ranks[0], len(self.ranks)))  # hashing 2048 ranks per look-up takes minutes

    def __str__(self) -> str:
        return f"`{self.group}` of {format_ranks(self.ranks)}"


@dataclass(frozen=True)
class P2POpEndpoint:
    """One end of a message, and the code location that posts it."""

    message: P2POpRecord
    code_location: str


CollectivesByCommunicator = dict[Communicator, dict[int, list[CollectiveRecord]]]
"""Collectives by communicator and rank."""
EndpointsByChannel = dict[tuple[Communicator, int, int], list[P2POpEndpoint]]
"""Ends of messages by communicator, sender and receiver."""


def group_collectives(logs: Sequence[RankLog]) -> CollectivesByCommunicator:
    """Return the collectives of every rehearsed member, an empty list for a member without any."""
    rehearsed = [log.rank for log in logs]
    found: CollectivesByCommunicator = {}
    for log in logs:
        for event in log.events:
            if isinstance(event, CollectiveRecord):
                communicator = Communicator.from_event(event)
                if communicator not in found:
                    found[communicator] = {rank: [] for rank in communicator.rehearsed_members(rehearsed)}
                found[communicator][log.rank].append(event)
    return found


def group_p2p_ops(logs: Sequence[RankLog]) -> tuple[EndpointsByChannel, EndpointsByChannel]:
    """Return the sends and the receives between rehearsed ranks."""
    rehearsed = {log.rank for log in logs}
    sent: EndpointsByChannel = defaultdict(list)
    received: EndpointsByChannel = defaultdict(list)
    for log in logs:
        for event in log.events:
            if not isinstance(event, P2PBatchRecord):
                continue
            communicator = Communicator.from_event(event)
            for message in event.sends:
                if message.peer in rehearsed:
                    sent[communicator, log.rank, message.peer].append(P2POpEndpoint(message, event.code_location))
            for message in event.receives:
                if message.peer in rehearsed:
                    received[communicator, message.peer, log.rank].append(P2POpEndpoint(message, event.code_location))
    return sent, received
