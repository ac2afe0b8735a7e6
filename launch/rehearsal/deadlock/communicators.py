"""Calls of the rehearsed ranks, grouped by communicator, in the order of each rank's host."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ..findings import format_ranks
from ..log import CollectiveRecord, P2PBatchRecord, P2POpRecord, RankLog


@dataclass(frozen=True)
class Communicator:
    """Process group, identified by its name and its ranks."""

    group: str
    ranks: tuple[int, ...]

    def __hash__(self) -> int:
        return hash((self.group, self.ranks[0], len(self.ranks)))  # hashing 2048 ranks per look-up takes minutes

    def __str__(self) -> str:
        return f"`{self.group}` of {format_ranks(self.ranks)}"


@dataclass(frozen=True)
class P2POpEndpoint:
    """One end of a message, and the code location that posts it."""

    message: P2POpRecord
    code_location: str


Channel: TypeAlias = tuple[Communicator, int, int]
"""Communicator, sender and receiver."""
CollectivesByCommunicator: TypeAlias = dict[Communicator, dict[int, list[CollectiveRecord]]]
"""Collectives by communicator and rank."""
EndpointsByChannel: TypeAlias = dict[Channel, list[P2POpEndpoint]]


def channel_messages(
    communicator: Communicator, rank: int, batch: P2PBatchRecord
) -> Iterator[tuple[Channel, P2POpRecord]]:
    """Yield the messages of a rank's batch with their channels, the sends first."""
    for message in batch.sends:
        yield (communicator, rank, message.peer), message
    for message in batch.receives:
        yield (communicator, message.peer, rank), message


def group_collectives(logs: Sequence[RankLog]) -> CollectivesByCommunicator:
    """Return the collectives of every rehearsed member, an empty list for a member without any."""
    rehearsed = {log.rank for log in logs}
    found: CollectivesByCommunicator = {}
    for log in logs:
        for event in log.events_of(CollectiveRecord):
            communicator = Communicator(event.group, event.ranks)
            if communicator not in found:
                found[communicator] = {rank: [] for rank in sorted(rehearsed.intersection(event.ranks))}
            found[communicator][log.rank].append(event)
    return found


def group_p2p_ops(logs: Sequence[RankLog]) -> tuple[EndpointsByChannel, EndpointsByChannel]:
    """Return the sends and the receives between rehearsed ranks."""
    rehearsed = {log.rank for log in logs}
    sent: EndpointsByChannel = defaultdict(list)
    received: EndpointsByChannel = defaultdict(list)
    for log in logs:
        for event in log.events_of(P2PBatchRecord):
            for channel, message in channel_messages(Communicator(event.group, event.ranks), log.rank, event):
                if message.peer in rehearsed:
                    ends = sent if channel[1] == log.rank else received
                    ends[channel].append(P2POpEndpoint(message, event.code_location))
    return sent, received
