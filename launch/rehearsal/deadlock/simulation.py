"""The connection model: whether the logs of the rehearsed ranks can run to their end on NCCL, without a clock.

The rules, from NCCL's source (`enqueue.cc`, `group.cc`, `transport.cc`):

* A pair's first message on a communicator, in each direction, and a communicator's first collective of each kind
  connect inside the call: the calling host waits until the other members have made theirs.
* Later calls are only queued on a stream. A stream runs its queue in order; the operations of one communicator run in
  the order of their launch, also across streams.
* A collective ends when all members are in it. A P2P batch ends when the other end of each of its messages is in its
  batch.
* Where two ranks are next and previous to each other at once, NCCL sends what it needs of both directions in one
  record: first calls that connect different directions end in an error.

Computing takes no time here. Members that were not rehearsed always do their part.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from ..fault import Fault
from ..log import Collective, HostWait, Message, MessageBatch, RankLog, Record, StreamWait
from .communicators import Communicator
from .waits import (
    CONTROL,
    HOST,
    Actor,
    CollectiveEnd,
    FirstCollective,
    FirstMessage,
    MessageEnd,
    Reached,
    Turn,
    Wait,
    turn_key,
)

Pair = tuple[Communicator, int, int]
"""A communicator, the sender and the receiver."""


@dataclass(frozen=True)
class QueuedCollective:
    """On a stream: `number` counts the rank's collectives, `turn` its operations on the communicator."""

    event: Collective
    communicator: Communicator
    number: int
    turn: int


@dataclass(frozen=True)
class QueuedBatch:
    """On a stream: messages to rehearsed ranks, each with its number between the two."""

    event: MessageBatch
    communicator: Communicator
    messages: tuple[tuple[Pair, int, str], ...]
    turn: int


Queued: TypeAlias = QueuedCollective | QueuedBatch | Reached


@dataclass
class Queue:
    """A stream of one rank."""

    items: deque[Queued] = field(default_factory=deque)
    queued: int = 0
    done: int = 0
    is_open: bool = False
    """Whether the first of `items` has begun."""


@dataclass
class Host:
    """A rehearsed rank: where its host is in its log, and what it has recorded."""

    log: RankLog
    position: int = 0
    has_entered: bool = False
    """Whether the call at `position` has been made, and waits for its connections."""
    recorded: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Of an event: its stream, and how much had been queued there."""


class ConnectionSimulation:
    """The state of all rehearsed ranks; after `run` the actors in `waiting` are stuck."""

    def __init__(self, logs: Sequence[RankLog]) -> None:
        self.hosts = {log.rank: Host(log) for log in logs}
        self.queues: defaultdict[Actor, Queue] = defaultdict(Queue)
        self.waiting: dict[Actor, Wait] = {}
        self.faults: list[Fault] = []
        self.calls: defaultdict[FirstCollective | FirstMessage, set[int]] = defaultdict(set)
        """Ranks that have made the first call of its kind."""
        self.inside: defaultdict[tuple[Communicator, int], set[int]] = defaultdict(set)
        """Ranks that are, or were, in a collective, by its number."""
        self.holder: dict[tuple[Hashable, int], Actor] = {}
        """The stream that has an operation: by the key of the wait for its end and rank, or by `turn_key` and turn."""
        self._launched: defaultdict[tuple[int, Communicator], int] = defaultdict(int)
        self._collectives: defaultdict[tuple[int, Communicator], int] = defaultdict(int)
        self._ended: defaultdict[tuple[int, Communicator], int] = defaultdict(int)
        self._posted: defaultdict[tuple[int, Pair], int] = defaultdict(int)
        self._open_ends: defaultdict[tuple[Pair, int], set[int]] = defaultdict(set)
        self._contacts: dict[tuple[Communicator, int, int], tuple[frozenset[Pair], str]] = {}
        self._members: dict[Communicator, frozenset[int]] = {}
        self._communicators: dict[Communicator, Communicator] = {}
        self._asleep: defaultdict[Hashable, list[Actor]] = defaultdict(list)
        self._ready: deque[Actor] = deque(Actor(rank) for rank in self.hosts)

    def run(self) -> None:
        """Let everything run until nothing can move."""
        while self._ready:
            actor = self._ready.popleft()
            self.waiting.pop(actor, None)
            wait = self._run_host(actor) if actor.stream == HOST else self._run_stream(actor)
            if wait is not None:
                self.waiting[actor] = wait
                self._asleep[wait.key].append(actor)

    def members(self, communicator: Communicator) -> frozenset[int]:
        """Return the rehearsed ones."""
        if communicator not in self._members:
            self._members[communicator] = frozenset(communicator.ranks).intersection(self.hosts)
        return self._members[communicator]

    def _communicator(self, event: Collective | MessageBatch) -> Communicator:
        """Return the one object for a communicator: what is identical is not compared rank by rank."""
        communicator = Communicator.of(event)
        return self._communicators.setdefault(communicator, communicator)

    def has_ended(self, rank: int) -> bool:
        """Return whether the host has done all that is in its log."""
        host = self.hosts[rank]
        return host.position == len(host.log.events)

    def _wake(self, key: Hashable) -> None:
        self._ready.extend(self._asleep.pop(key, ()))

    def _run_host(self, actor: Actor) -> Wait | None:
        host = self.hosts[actor.rank]
        events = host.log.events
        while host.position < len(events):
            event = events[host.position]
            wait: Wait | None = None
            if isinstance(event, Record):
                host.recorded[event.event] = (event.stream, self.queues[Actor(actor.rank, event.stream)].queued)
            elif isinstance(event, StreamWait):
                reached = self._reached(host, event.event, event.stream, "an event")
                self._queue(Actor(actor.rank, event.stream), reached)
            elif isinstance(event, HostWait):
                wait = self._unless_done(self._reached(host, event.event, event.stream, event.reason))
            elif isinstance(event, Collective):
                wait = self._call_collective(host, event)
            else:
                wait = self._call_batch(host, event)
            if wait is not None:
                return wait
            host.position += 1
            host.has_entered = False
        return None

    def _reached(self, host: Host, event: int | None, stream: str, why: str) -> Reached:
        """Return the wait for an event, or for all that is queued on a stream; an event never recorded is complete."""
        if event is not None:
            stream, items = host.recorded.get(event, (stream, 0))
        else:
            items = self.queues[Actor(host.log.rank, stream)].queued
        return Reached(Actor(host.log.rank, stream), items, why)

    def _unless_done(self, reached: Reached) -> Reached | None:
        return None if self.queues[reached.actor].done >= reached.items else reached

    def _call_collective(self, host: Host, event: Collective) -> Wait | None:
        rank, communicator = host.log.rank, self._communicator(event)
        if event.group == CONTROL:
            return self._call_control(host, event, communicator)
        first = FirstCollective(communicator, event.operation)
        if not self._connect(first, rank, self.members(communicator)):
            return first
        self._queue_collective(Actor(rank, event.stream), event, communicator)
        return None

    def _call_control(self, host: Host, event: Collective, communicator: Communicator) -> Wait | None:
        """Gloo: the host is in the collective itself, until it ends."""
        actor = Actor(host.log.rank, CONTROL)
        if not host.has_entered:
            host.has_entered = True
            self._queue_collective(actor, event, communicator)
        return self._unless_done(Reached(actor, self.queues[actor].queued, "a collective of the host"))

    def _queue_collective(self, actor: Actor, event: Collective, communicator: Communicator) -> None:
        number = self._next(self._collectives, actor.rank, communicator)
        turn = self._next(self._launched, actor.rank, communicator)
        self.holder[CollectiveEnd(communicator, number, event.what).key, actor.rank] = actor
        self.holder[turn_key(communicator, actor.rank), turn] = actor
        self._queue(actor, QueuedCollective(event, communicator, number, turn))

    @staticmethod
    def _next(counts: defaultdict[tuple[int, Communicator], int], rank: int, communicator: Communicator) -> int:
        counts[rank, communicator] += 1
        return counts[rank, communicator] - 1

    def _connect(self, first: FirstCollective | FirstMessage, rank: int, needed: frozenset[int]) -> bool:
        """Note that a rank has called; return whether all that are needed have."""
        called = self.calls[first]
        if rank not in called:
            called.add(rank)
            self._wake(first.key)
        return needed <= called

    def _call_batch(self, host: Host, event: MessageBatch) -> Wait | None:
        rank, communicator = host.log.rank, self._communicator(event)
        pairs = [(communicator, rank, message.peer) for message in event.sends if message.peer in self.hosts]
        pairs += [(communicator, message.peer, rank) for message in event.receives if message.peer in self.hosts]
        if not host.has_entered:
            host.has_entered = True
            self._meet(rank, communicator, pairs, event.place)
        firsts = [(FirstMessage(*pair), frozenset(pair[1:])) for pair in dict.fromkeys(pairs)]
        connected = [self._connect(first, rank, ends) for first, ends in firsts]
        if not all(connected):
            return firsts[connected.index(False)][0]
        self._queue_batch(Actor(rank, event.stream), event, communicator)
        return None

    def _meet(self, rank: int, communicator: Communicator, pairs: Sequence[Pair], place: str) -> None:
        """Hold the first calls of two ranks that are next and previous at once against each other."""
        new = [pair for pair in dict.fromkeys(pairs) if rank not in self.calls[FirstMessage(*pair)]]
        for peer in sorted({other for pair in new for other in pair[1:] if other != rank}):
            if not _is_next_and_previous(communicator, rank, peer):
                continue
            ours = frozenset(pair for pair in new if peer in pair[1:])
            theirs, their_place = self._contacts.pop((communicator, peer, rank), (None, ""))
            if theirs is None:
                self._contacts[communicator, rank, peer] = (ours, place)
            elif theirs != ours:
                self.faults.append(_contact_fault(communicator, (peer, theirs, their_place), (rank, ours, place)))
                for first in (FirstMessage(*pair) for pair in ours | theirs):
                    self.calls[first] |= {rank, peer}  # what comes behind the error is looked at too
                    self._wake(first.key)

    def _queue_batch(self, actor: Actor, event: MessageBatch, communicator: Communicator) -> None:
        rank = actor.rank
        turn = self._next(self._launched, rank, communicator)
        self.holder[turn_key(communicator, rank), turn] = actor
        messages = []
        for pair, message in _messages(communicator, rank, event):
            if message.peer in self.hosts:
                number = self._posted[rank, pair]
                self._posted[rank, pair] += 1
                self.holder[MessageEnd(*pair, number, message.what).key, rank] = actor
                messages.append((pair, number, message.what))
        self._queue(actor, QueuedBatch(event, communicator, tuple(messages), turn))

    def _queue(self, actor: Actor, item: Queued) -> None:
        queue = self.queues[actor]
        queue.items.append(item)
        queue.queued += 1
        if len(queue.items) == 1:
            self._ready.append(actor)

    def _run_stream(self, actor: Actor) -> Wait | None:
        queue = self.queues[actor]
        while queue.items:
            item = queue.items[0]
            wait = self._unless_done(item) if isinstance(item, Reached) else self._run_operation(actor, queue, item)
            if wait is not None:
                return wait
            queue.items.popleft()
            queue.done += 1
            queue.is_open = False
            if not isinstance(item, Reached):
                self._ended[actor.rank, item.communicator] += 1
                self._wake(turn_key(item.communicator, actor.rank))
            self._wake(actor)
        return None

    def _run_operation(self, actor: Actor, queue: Queue, item: QueuedCollective | QueuedBatch) -> Wait | None:
        if not queue.is_open:
            if self._ended[actor.rank, item.communicator] < item.turn:
                return Turn(item.communicator, actor.rank, item.turn)
            queue.is_open = True
            self._open(actor.rank, item)
        if isinstance(item, QueuedCollective):
            missing = self.members(item.communicator) - self.inside[item.communicator, item.number]
            return CollectiveEnd(item.communicator, item.number, item.event.what) if missing else None
        for pair, number, what in item.messages:
            if len(self._open_ends[pair, number]) < 2:
                return MessageEnd(*pair, number, what)
        return None

    def _open(self, rank: int, item: QueuedCollective | QueuedBatch) -> None:
        """The operation begins on the device."""
        if isinstance(item, QueuedCollective):
            self.inside[item.communicator, item.number].add(rank)
            if self.members(item.communicator) <= self.inside[item.communicator, item.number]:
                self._wake(CollectiveEnd(item.communicator, item.number, item.event.what).key)
            return
        for pair, number, what in item.messages:
            self._open_ends[pair, number].add(rank)
            self._wake(MessageEnd(*pair, number, what).key)


def _messages(communicator: Communicator, rank: int, event: MessageBatch) -> Iterator[tuple[Pair, Message]]:
    for message in event.sends:
        yield (communicator, rank, message.peer), message
    for message in event.receives:
        yield (communicator, message.peer, rank), message


def _is_next_and_previous(communicator: Communicator, rank: int, peer: int) -> bool:
    """As NCCL's rounds go: its peer to send to and its peer to receive from are one rank."""
    ranks = communicator.ranks
    return 2 * (ranks.index(rank) - ranks.index(peer)) % len(ranks) == 0


_Contact = tuple[int, frozenset[Pair], str]


def _contact_fault(communicator: Communicator, *contacts: _Contact) -> Fault:
    has = "; ".join(f"the first batch of rank {rank} {_directions(rank, pairs)}" for rank, pairs, _ in contacts)
    text = (
        f"on {communicator} the two are next and previous to each other at once, and NCCL connects both directions by"
        f" one record: {has}. It ends in an error; let both connect both directions first"
    )
    ranks = tuple(rank for rank, _, _ in contacts)
    return Fault("first contact", ranks, text, tuple(place for _, _, place in contacts))


def _directions(rank: int, pairs: frozenset[Pair]) -> str:
    does = {"sends" if source == rank else "receives" for _, source, _ in pairs}
    return " and ".join(sorted(does, reverse=True)) + (" only" if len(does) == 1 else "")
