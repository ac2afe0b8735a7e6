"""What the rehearsed ranks do on each communicator, in the order of each rank's host."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..fault import ranks_text
from ..log import Collective, Message, MessageBatch, RankLog


@dataclass(frozen=True)
class Communicator:
    """A process group, known by its name and its ranks."""

    group: str
    ranks: tuple[int, ...]

    @staticmethod
    def of(event: Collective | MessageBatch) -> Communicator:
        """Return that which an event uses."""
        return Communicator(event.group, event.ranks)

    def members(self, rehearsed: Iterable[int]) -> list[int]:
        """Return those of the `rehearsed` ranks that belong to it, ascending."""
        return sorted(set(self.ranks).intersection(rehearsed))

    def __hash__(self) -> int:
        return hash((self.group, self.ranks[0], len(self.ranks)))  # of 2048 ranks at each look-up would take minutes

    def __str__(self) -> str:
        return f"`{self.group}` of {ranks_text(self.ranks)}"


@dataclass(frozen=True)
class End:
    """One end of a message, and where the code posts it."""

    message: Message
    place: str


Collectives = dict[Communicator, dict[int, list[Collective]]]
"""By communicator and rank."""
Ends = dict[tuple[Communicator, int, int], list[End]]
"""By communicator, sender and receiver."""


def collectives_of(logs: Sequence[RankLog]) -> Collectives:
    """Return the collectives of every rehearsed member, an empty list for one that has none."""
    rehearsed = [log.rank for log in logs]
    found: Collectives = {}
    for log in logs:
        for event in log.events:
            if isinstance(event, Collective):
                communicator = Communicator.of(event)
                if communicator not in found:
                    found[communicator] = {rank: [] for rank in communicator.members(rehearsed)}
                found[communicator][log.rank].append(event)
    return found


def messages_of(logs: Sequence[RankLog]) -> tuple[Ends, Ends]:
    """Return what is sent and what is received between rehearsed ranks."""
    rehearsed = {log.rank for log in logs}
    sent: Ends = defaultdict(list)
    received: Ends = defaultdict(list)
    for log in logs:
        for event in log.events:
            if not isinstance(event, MessageBatch):
                continue
            communicator = Communicator.of(event)
            for message in event.sends:
                if message.peer in rehearsed:
                    sent[communicator, log.rank, message.peer].append(End(message, event.place))
            for message in event.receives:
                if message.peer in rehearsed:
                    received[communicator, message.peer, log.rank].append(End(message, event.place))
    return sent, received
