"""Deadlock check: simulate the logs of the rehearsed ranks on NCCL, without a clock, until they end or hang.

The rules, from NCCL's source (`enqueue.cc`, `group.cc`, `transport.cc`):

* A pair's first message on a communicator, in each direction, and a communicator's first collective of each kind
  connect inside the call: the calling host waits until the other members have made their call.
* Later calls are only queued on a stream. A stream runs its queue in order; the operations of one communicator run in
  the order of their launch, also across streams.
* A collective ends when all members are in it. A P2P batch ends when the other end of each of its messages is in its
  batch.
* If two ranks are both next and previous to each other, NCCL exchanges the data of both directions in one record:
  first calls that connect different directions end in an error.

Computation takes no time here. Members that were not rehearsed are never waited for.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from ..findings import RunFinding
from ..log import CollectiveRecord, EventRecord, HostWait, P2PBatchRecord, P2POpRecord, RankLog, StreamWait
from .communicators import Communicator
from .waits import (
    CONTROL_GROUP,
    HOST_STREAM,
    Actor,
    CollectiveCompletionWait,
    CollectiveConnectWait,
    LaunchOrderWait,
    P2PCompletionWait,
    P2PConnectWait,
    StreamProgressWait,
    Wait,
    launch_order_key,
)

ChannelKey = tuple[Communicator, int, int]
"""Communicator, sender and receiver."""


@dataclass(frozen=True)
class QueuedCollective:
    """Collective in a stream's queue; the indices count the rank's collectives and all of its launches."""

    event: CollectiveRecord
    communicator: Communicator
    collective_index: int
    launch_index: int


@dataclass(frozen=True)
class QueuedP2PBatch:
    """P2P batch in a stream's queue: messages with rehearsed ranks, each with its number on its channel."""

    event: P2PBatchRecord
    communicator: Communicator
    messages: tuple[tuple[ChannelKey, int, str], ...]
    launch_index: int


QueuedItem: TypeAlias = QueuedCollective | QueuedP2PBatch | StreamProgressWait


@dataclass
class StreamQueue:
    """Queue of one stream of one rank."""

    items: deque[QueuedItem] = field(default_factory=deque)
    enqueued_count: int = 0
    completed_count: int = 0
    head_started: bool = False
    """True if the first of `items` has started."""


@dataclass
class HostState:
    """Host of a rehearsed rank: its position in its log, and its recorded events."""

    log: RankLog
    position: int = 0
    is_call_pending: bool = False
    """True if the call at `position` has been made and waits for its connections."""
    recorded_events: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Stream of each event, and the number of items queued there before it."""


class DeadlockSimulation:
    """Simulation of all rehearsed ranks; after `run` the actors in `waiting` hang."""

    def __init__(self, logs: Sequence[RankLog]) -> None:
        self.hosts = {log.rank: HostState(log) for log in logs}
        self.queues: defaultdict[Actor, StreamQueue] = defaultdict(StreamQueue)
        self.waiting: dict[Actor, Wait] = {}
        self.findings: list[RunFinding] = []
        self.ranks_connecting: defaultdict[CollectiveConnectWait | P2PConnectWait, set[int]] = defaultdict(set)
        """Ranks that have made the call that connects."""
        self.ranks_in_collective: defaultdict[tuple[Communicator, int], set[int]] = defaultdict(set)
        """Ranks that have started a collective, by its number."""
        self.stream_of_operation: dict[tuple[Hashable, int], Actor] = {}
        """Stream of each operation, by the wake key of its completion and rank, or by `launch_order_key` and index."""
        self._launched: defaultdict[tuple[int, Communicator], int] = defaultdict(int)
        self._collectives: defaultdict[tuple[int, Communicator], int] = defaultdict(int)
        self._ended: defaultdict[tuple[int, Communicator], int] = defaultdict(int)
        self._posted: defaultdict[tuple[int, ChannelKey], int] = defaultdict(int)
        self._started_ends: defaultdict[tuple[ChannelKey, int], set[int]] = defaultdict(set)
        self._pending_connections: dict[tuple[Communicator, int, int], tuple[frozenset[ChannelKey], str]] = {}
        self._members: dict[Communicator, frozenset[int]] = {}
        self._communicators: dict[Communicator, Communicator] = {}
        self._sleepers: defaultdict[Hashable, list[Actor]] = defaultdict(list)
        self._ready: deque[Actor] = deque(Actor(rank) for rank in self.hosts)

    def run(self) -> None:
        """Run hosts and streams until none can continue."""
        while self._ready:
            actor = self._ready.popleft()
            self.waiting.pop(actor, None)
            wait = self._run_host(actor) if actor.stream == HOST_STREAM else self._run_stream(actor)
            if wait is not None:
                self.waiting[actor] = wait
                self._sleepers[wait.wake_key].append(actor)

    def rehearsed_members(self, communicator: Communicator) -> frozenset[int]:
        """Return the rehearsed members of a communicator."""
        if communicator not in self._members:
            self._members[communicator] = frozenset(communicator.ranks).intersection(self.hosts)
        return self._members[communicator]

    def _communicator(self, event: CollectiveRecord | P2PBatchRecord) -> Communicator:
        """Return one shared object per communicator, since identical objects are not compared rank by rank."""
        communicator = Communicator.from_event(event)
        return self._communicators.setdefault(communicator, communicator)

    def has_host_finished(self, rank: int) -> bool:
        """Return whether the host has reached the end of its log."""
        host = self.hosts[rank]
        return host.position == len(host.log.events)

    def _wake(self, key: Hashable) -> None:
        self._ready.extend(self._sleepers.pop(key, ()))

    def _run_host(self, actor: Actor) -> Wait | None:
        host = self.hosts[actor.rank]
        events = host.log.events
        while host.position < len(events):
            event = events[host.position]
            wait: Wait | None = None
            if isinstance(event, EventRecord):
                host.recorded_events[event.event] = (
                    event.stream,
                    self.queues[Actor(actor.rank, event.stream)].enqueued_count,
                )
            elif isinstance(event, StreamWait):
                wanted = self._progress_wait(host, event.event, event.stream, "an event")
                self._queue(Actor(actor.rank, event.stream), wanted)
            elif isinstance(event, HostWait):
                wait = self._wait_unless_done(self._progress_wait(host, event.event, event.stream, event.reason))
            elif isinstance(event, CollectiveRecord):
                wait = self._call_collective(host, event)
            else:
                wait = self._call_batch(host, event)
            if wait is not None:
                return wait
            host.position += 1
            host.is_call_pending = False
        return None

    def _progress_wait(self, host: HostState, event: int | None, stream: str, reason: str) -> StreamProgressWait:
        """Return the wait for an event, or for all items of a stream; an event never recorded is complete."""
        if event is not None:
            stream, items = host.recorded_events.get(event, (stream, 0))
        else:
            items = self.queues[Actor(host.log.rank, stream)].enqueued_count
        return StreamProgressWait(Actor(host.log.rank, stream), items, reason)

    def _wait_unless_done(self, wanted: StreamProgressWait) -> StreamProgressWait | None:
        return None if self.queues[wanted.actor].completed_count >= wanted.completed_count else wanted

    def _call_collective(self, host: HostState, event: CollectiveRecord) -> Wait | None:
        rank, communicator = host.log.rank, self._communicator(event)
        if event.group == CONTROL_GROUP:
            return self._call_control(host, event, communicator)
        first = CollectiveConnectWait(communicator, event.operation)
        if not self._connect(first, rank, self.rehearsed_members(communicator)):
            return first
        self._queue_collective(Actor(rank, event.stream), event, communicator)
        return None

    def _call_control(self, host: HostState, event: CollectiveRecord, communicator: Communicator) -> Wait | None:
        """Simulate a call over gloo, in which the host waits for the end of the collective."""
        actor = Actor(host.log.rank, CONTROL_GROUP)
        if not host.is_call_pending:
            host.is_call_pending = True
            self._queue_collective(actor, event, communicator)
        return self._wait_unless_done(
            StreamProgressWait(actor, self.queues[actor].enqueued_count, "a collective of the host")
        )

    def _queue_collective(self, actor: Actor, event: CollectiveRecord, communicator: Communicator) -> None:
        number = self._next(self._collectives, actor.rank, communicator)
        launch_index = self._next(self._launched, actor.rank, communicator)
        self.stream_of_operation[CollectiveCompletionWait(communicator, number, event.purpose).wake_key, actor.rank] = (
            actor
        )
        self.stream_of_operation[launch_order_key(communicator, actor.rank), launch_index] = actor
        self._queue(actor, QueuedCollective(event, communicator, number, launch_index))

    @staticmethod
    def _next(counts: defaultdict[tuple[int, Communicator], int], rank: int, communicator: Communicator) -> int:
        counts[rank, communicator] += 1
        return counts[rank, communicator] - 1

    def _connect(self, first: CollectiveConnectWait | P2PConnectWait, rank: int, needed: frozenset[int]) -> bool:
        """Record a rank's call; return whether all needed ranks have called."""
        called = self.ranks_connecting[first]
        if rank not in called:
            called.add(rank)
            self._wake(first.wake_key)
        return needed <= called

    def _call_batch(self, host: HostState, event: P2PBatchRecord) -> Wait | None:
        rank, communicator = host.log.rank, self._communicator(event)
        pairs = [(communicator, rank, message.peer) for message in event.sends if message.peer in self.hosts]
        pairs += [(communicator, message.peer, rank) for message in event.receives if message.peer in self.hosts]
        if not host.is_call_pending:
            host.is_call_pending = True
            self._check_mutual_connection(rank, communicator, pairs, event.code_location)
        connects = [(P2PConnectWait(*pair), frozenset(pair[1:])) for pair in dict.fromkeys(pairs)]
        connected = [self._connect(first, rank, ends) for first, ends in connects]
        if not all(connected):
            return connects[connected.index(False)][0]
        self._queue_batch(Actor(rank, event.stream), event, communicator)
        return None

    def _check_mutual_connection(
        self, rank: int, communicator: Communicator, pairs: Sequence[ChannelKey], place: str
    ) -> None:
        """Compare the first batches of two ranks that are both next and previous to each other."""
        new = [pair for pair in dict.fromkeys(pairs) if rank not in self.ranks_connecting[P2PConnectWait(*pair)]]
        for peer in sorted({other for pair in new for other in pair[1:] if other != rank}):
            if not _is_next_and_previous(communicator, rank, peer):
                continue
            ours = frozenset(pair for pair in new if peer in pair[1:])
            theirs, their_place = self._pending_connections.pop((communicator, peer, rank), (None, ""))
            if theirs is None:
                self._pending_connections[communicator, rank, peer] = (ours, place)
            elif theirs != ours:
                first_batches = (peer, theirs, their_place), (rank, ours, place)
                self.findings.append(_connection_finding(communicator, *first_batches))
                for first in (P2PConnectWait(*pair) for pair in ours | theirs):
                    self.ranks_connecting[first] |= {rank, peer}  # continue, to check the calls after the error too
                    self._wake(first.wake_key)

    def _queue_batch(self, actor: Actor, event: P2PBatchRecord, communicator: Communicator) -> None:
        rank = actor.rank
        launch_index = self._next(self._launched, rank, communicator)
        self.stream_of_operation[launch_order_key(communicator, rank), launch_index] = actor
        messages = []
        for pair, message in _messages(communicator, rank, event):
            if message.peer in self.hosts:
                number = self._posted[rank, pair]
                self._posted[rank, pair] += 1
                self.stream_of_operation[P2PCompletionWait(*pair, number, message.purpose).wake_key, rank] = actor
                messages.append((pair, number, message.purpose))
        self._queue(actor, QueuedP2PBatch(event, communicator, tuple(messages), launch_index))

    def _queue(self, actor: Actor, item: QueuedItem) -> None:
        queue = self.queues[actor]
        queue.items.append(item)
        queue.enqueued_count += 1
        if len(queue.items) == 1:
            self._ready.append(actor)

    def _run_stream(self, actor: Actor) -> Wait | None:
        queue = self.queues[actor]
        while queue.items:
            item = queue.items[0]
            wait = (
                self._wait_unless_done(item)
                if isinstance(item, StreamProgressWait)
                else self._run_operation(actor, queue, item)
            )
            if wait is not None:
                return wait
            queue.items.popleft()
            queue.completed_count += 1
            queue.head_started = False
            if not isinstance(item, StreamProgressWait):
                self._ended[actor.rank, item.communicator] += 1
                self._wake(launch_order_key(item.communicator, actor.rank))
            self._wake(actor)
        return None

    def _run_operation(self, actor: Actor, queue: StreamQueue, item: QueuedCollective | QueuedP2PBatch) -> Wait | None:
        if not queue.head_started:
            if self._ended[actor.rank, item.communicator] < item.launch_index:
                return LaunchOrderWait(item.communicator, actor.rank, item.launch_index)
            queue.head_started = True
            self._start(actor.rank, item)
        if isinstance(item, QueuedCollective):
            missing = (
                self.rehearsed_members(item.communicator)
                - self.ranks_in_collective[item.communicator, item.collective_index]
            )
            return (
                CollectiveCompletionWait(item.communicator, item.collective_index, item.event.purpose)
                if missing
                else None
            )
        for pair, number, purpose in item.messages:
            if len(self._started_ends[pair, number]) < 2:
                return P2PCompletionWait(*pair, number, purpose)
        return None

    def _start(self, rank: int, item: QueuedCollective | QueuedP2PBatch) -> None:
        """Start an operation on the device, and wake the actors that it completes."""
        if isinstance(item, QueuedCollective):
            self.ranks_in_collective[item.communicator, item.collective_index].add(rank)
            if (
                self.rehearsed_members(item.communicator)
                <= self.ranks_in_collective[item.communicator, item.collective_index]
            ):
                self._wake(
                    CollectiveCompletionWait(item.communicator, item.collective_index, item.event.purpose).wake_key
                )
            return
        for pair, number, purpose in item.messages:
            self._started_ends[pair, number].add(rank)
            self._wake(P2PCompletionWait(*pair, number, purpose).wake_key)


def _messages(communicator: Communicator, rank: int, event: P2PBatchRecord) -> Iterator[tuple[ChannelKey, P2POpRecord]]:
    for message in event.sends:
        yield (communicator, rank, message.peer), message
    for message in event.receives:
        yield (communicator, message.peer, rank), message


def _is_next_and_previous(communicator: Communicator, rank: int, peer: int) -> bool:
    """Return whether a rank and its peer are opposite: both next and previous to each other."""
    ranks = communicator.ranks  # in NCCL's rounds of P2P, the rank to send to and the rank to receive from are then one
    return 2 * (ranks.index(rank) - ranks.index(peer)) % len(ranks) == 0


_FirstBatch = tuple[int, frozenset[ChannelKey], str]


def _connection_finding(communicator: Communicator, *batches: _FirstBatch) -> RunFinding:
    has = "; ".join(f"the first batch of rank {rank} {_directions(rank, pairs)}" for rank, pairs, _ in batches)
    text = (
        f"on {communicator} the two ranks are both next and previous to each other, and NCCL connects both directions"
        f" with one record: {has}. It ends in an error; connect both directions in one batch first"
    )
    ranks = tuple(rank for rank, _, _ in batches)
    return RunFinding("first contact", ranks, text, tuple(place for _, _, place in batches))


def _directions(rank: int, pairs: frozenset[ChannelKey]) -> str:
    does = {"sends" if source == rank else "receives" for _, source, _ in pairs}
    return " and ".join(sorted(does, reverse=True)) + (" only" if len(does) == 1 else "")
