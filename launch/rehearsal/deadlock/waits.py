"""What a host or a stream of a rehearsed rank can wait for. Each is also the key under which it is woken."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TypeAlias

from .communicators import Communicator

HOST_STREAM = ""
CONTROL_GROUP = "control"
"""Name of the group whose operations are the host's own: no stream has them."""


@dataclass(frozen=True)
class Actor:
    """The host of a rank, or one of its streams."""

    rank: int
    stream: str = HOST_STREAM

    def __str__(self) -> str:
        return f"rank {self.rank}, {f'stream {self.stream}' if self.stream else 'host'}"


@dataclass(frozen=True)
class CollectiveConnectWait:
    """A host connects the rings of a communicator, until every rehearsed member does."""

    communicator: Communicator
    operation: str

    @property
    def wake_key(self) -> Hashable:
        """What wakes it."""
        return self


@dataclass(frozen=True)
class P2PConnectWait:
    """A host connects a pair in one direction, until the other end does."""

    communicator: Communicator
    source: int
    target: int

    @property
    def wake_key(self) -> Hashable:
        """What wakes it."""
        return self


@dataclass(frozen=True)
class StreamProgressWait:
    """A host or a stream waits until a stream of its rank has done what was queued there."""

    actor: Actor
    completed_count: int
    """How many the stream must have done."""
    reason: str

    @property
    def wake_key(self) -> Hashable:
        """What wakes it."""
        return self.actor


@dataclass(frozen=True)
class CollectiveCompletionWait:
    """A stream is in a collective, until every rehearsed member is in it."""

    communicator: Communicator
    collective_index: int
    purpose: str

    @property
    def wake_key(self) -> Hashable:
        """What wakes it."""
        return "collective", self.communicator, self.collective_index


@dataclass(frozen=True)
class P2PCompletionWait:
    """A stream is in a P2P batch, until the other end of this message is in its batch."""

    communicator: Communicator
    source: int
    target: int
    message_index: int
    purpose: str

    @property
    def wake_key(self) -> Hashable:
        """What wakes it."""
        return "message", self.communicator, self.source, self.target, self.message_index


@dataclass(frozen=True)
class LaunchOrderWait:
    """A stream waits for an earlier operation of its rank on the same communicator, which another stream has."""

    communicator: Communicator
    rank: int
    launch_index: int
    """Of the operation that waits, among this rank's on the communicator."""

    @property
    def wake_key(self) -> Hashable:
        """What wakes it."""
        return launch_order_key(self.communicator, self.rank)


def launch_order_key(communicator: Communicator, rank: int) -> Hashable:
    """Return the key of all that waits for an operation of `rank` on `communicator` to end."""
    return "turn", communicator, rank


Wait: TypeAlias = (
    CollectiveConnectWait
    | P2PConnectWait
    | StreamProgressWait
    | CollectiveCompletionWait
    | P2PCompletionWait
    | LaunchOrderWait
)
