"""Waits of the hosts and streams of rehearsed ranks, and what they wait for."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from .communicators import Communicator

HOST_STREAM = ""
CONTROL_GROUP = "control"
"""Name of the group whose operations run on the host and not on a stream."""


@dataclass(frozen=True)
class Actor:
    """Host of a rank, or one of its streams."""

    rank: int
    stream: str = HOST_STREAM

    def __str__(self) -> str:
        return f"rank {self.rank}, {f'stream {self.stream}' if self.stream else 'host'}"


@dataclass(eq=False)
class Rendezvous:
    """Step that ends when all of its rehearsed members are in it: a connection, a collective or a message."""

    members: frozenset[int]
    arrived: set[int] = field(default_factory=set)
    stream_of_rank: dict[int, Actor] = field(default_factory=dict)
    """Stream on which a member's operation is queued; a member without one has to make the call on its host."""

    @property
    def is_complete(self) -> bool:
        """True if all members have arrived."""
        return self.members <= self.arrived

    def wait(self, text: str) -> "ActorWait":
        """Return the wait of a member until all have arrived."""
        return ActorWait(self, text, self._missing_actors)

    def _missing_actors(self) -> list[Actor]:
        return [self.stream_of_rank.get(rank, Actor(rank)) for rank in sorted(self.members - self.arrived)]


@dataclass(eq=False)
class LaunchOrder:
    """Operations of one rank on one communicator, which run in the order of their launch, also across streams."""

    communicator: Communicator
    streams: list[Actor] = field(default_factory=list)
    """Stream of each operation."""
    ended_count: int = 0


@dataclass(frozen=True)
class ActorWait:
    """Wait of a host or a stream."""

    wake_key: Hashable
    """Key under which the wait is woken: a rendezvous, a launch order, or the stream whose progress is awaited."""
    text: str
    """What the waiting actor does, for messages."""
    blocking_actors: Callable[[], Sequence[Actor]]
    """Return the actors that are waited for."""
