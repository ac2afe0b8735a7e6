"""Waits of the hosts and streams of rehearsed ranks, each with the key under which it is woken."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TypeAlias

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


@dataclass(frozen=True)
class CollectiveConnectWait:
    """Wait of a host that connects the rings of a communicator, until every rehearsed member does."""

    communicator: Communicator
    operation: str

    @property
    def wake_key(self) -> Hashable:
        """Key under which the wait is woken."""
        return self


@dataclass(frozen=True)
class P2PConnectWait:
    """Wait of a host that connects two ranks in one direction, until the other end does."""

    communicator: Communicator
    source: int
    target: int

    @property
    def wake_key(self) -> Hashable:
        """Key under which the wait is woken."""
        return self


@dataclass(frozen=True)
class StreamProgressWait:
    """Wait of a host or a stream until a stream of its rank has completed `completed_count` items."""

    actor: Actor
    completed_count: int
    """Number of items that the stream must have completed."""
    reason: str

    @property
    def wake_key(self) -> Hashable:
        """Key under which the wait is woken."""
        return self.actor


@dataclass(frozen=True)
class CollectiveCompletionWait:
    """Wait of a stream in a collective, until every rehearsed member is in it."""

    communicator: Communicator
    collective_index: int
    purpose: str

    @property
    def wake_key(self) -> Hashable:
        """Key under which the wait is woken."""
        return "collective", self.communicator, self.collective_index


@dataclass(frozen=True)
class P2PCompletionWait:
    """Wait of a stream in a P2P batch, until the other end of this message is in its batch."""

    communicator: Communicator
    source: int
    target: int
    message_index: int
    purpose: str

    @property
    def wake_key(self) -> Hashable:
        """Key under which the wait is woken."""
        return "message", self.communicator, self.source, self.target, self.message_index


@dataclass(frozen=True)
class LaunchOrderWait:
    """Wait of a stream for an earlier operation of its rank on the same communicator, on another stream."""

    communicator: Communicator
    rank: int
    launch_index: int
    """Index of the waiting operation among this rank's launches on the communicator."""

    @property
    def wake_key(self) -> Hashable:
        """Key under which the wait is woken."""
        return launch_order_key(self.communicator, self.rank)


def launch_order_key(communicator: Communicator, rank: int) -> Hashable:
    """Return the wake key of waits for the end of an operation of `rank` on `communicator`."""
    return "turn", communicator, rank


Wait: TypeAlias = (
    CollectiveConnectWait
    | P2PConnectWait
    | StreamProgressWait
    | CollectiveCompletionWait
    | P2PCompletionWait
    | LaunchOrderWait
)
