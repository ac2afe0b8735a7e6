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

from collections import Counter, defaultdict, deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from ..findings import RunFinding
from ..log import CollectiveRecord, HostWait, LogEvent, P2PBatchRecord, RankLog, StreamWait
from .communicators import Channel, Communicator, channel_messages
from .waits import CONTROL_GROUP, HOST_STREAM, Actor, ActorWait, LaunchOrder, Rendezvous


@dataclass(frozen=True)
class StreamProgress:
    """Number of items that a stream must have completed, and the reason to wait for them."""

    actor: Actor
    completed_count: int
    reason: str


@dataclass(frozen=True)
class QueuedOperation:
    """Collective or P2P batch in a stream's queue, with its index among the rank's launches on the communicator."""

    order: LaunchOrder
    launch_index: int
    steps: Sequence[tuple[Rendezvous, str]]
    """The collective, or the messages with rehearsed ranks, each with the text of a wait in it."""


QueuedItem: TypeAlias = QueuedOperation | StreamProgress


@dataclass
class StreamQueue:
    """All items ever queued on one stream of one rank."""

    items: list[QueuedItem] = field(default_factory=list)
    completed_count: int = 0


@dataclass
class HostState:
    """Host of a rehearsed rank: its position in its events, and the events of streams that it has recorded."""

    events: Sequence[LogEvent]
    position: int = 0
    recorded_events: dict[int, tuple[Actor, int]] = field(default_factory=dict)
    """Stream of each event, and the number of items queued there before it."""

    @property
    def has_ended(self) -> bool:
        """True if the host has reached the end of its log."""
        return self.position == len(self.events)

    @property
    def code_location(self) -> str:
        """Code location of the call at `position`; a host only stops at calls that have one."""
        if self.has_ended:
            return "the end of its log"
        event = self.events[self.position]
        assert isinstance(event, CollectiveRecord | P2PBatchRecord | HostWait)
        return event.code_location


class DeadlockSimulation:
    """Simulation of all rehearsed ranks; after `run` the actors in `waiting` hang."""

    def __init__(self, logs: Sequence[RankLog]) -> None:
        self.hosts = {log.rank: HostState(tuple(_host_events(log))) for log in logs}
        self.waiting: dict[Actor, ActorWait] = {}
        self.findings: list[RunFinding] = []
        self._queues: defaultdict[Actor, StreamQueue] = defaultdict(StreamQueue)
        self._groups: dict[Communicator, tuple[Communicator, frozenset[int]]] = {}
        self._rendezvous: dict[Hashable, Rendezvous] = {}
        self._call_counts: Counter[tuple[int, Hashable]] = Counter()
        """Number of each rank's collectives by communicator, and of its messages by channel."""
        self._launch_orders: dict[tuple[int, Communicator], LaunchOrder] = {}
        self._pending_connections: dict[tuple[Communicator, int, int], tuple[frozenset[Channel], str]] = {}
        self._sleepers: defaultdict[Hashable, list[Actor]] = defaultdict(list)
        self._ready: deque[Actor] = deque(Actor(rank) for rank in self.hosts)

    def run(self) -> None:
        """Run hosts and streams until none can continue."""
        while self._ready:
            actor = self._ready.popleft()
            self.waiting.pop(actor, None)
            wait = self._run_host(actor.rank) if actor.stream == HOST_STREAM else self._run_stream(actor)
            if wait is not None:
                self.waiting[actor] = wait
                self._sleepers[wait.wake_key].append(actor)

    def _wake(self, key: Hashable) -> None:
        self._ready.extend(self._sleepers.pop(key, ()))

    def _run_host(self, rank: int) -> ActorWait | None:
        host = self.hosts[rank]
        while not host.has_ended:
            wait = self._run_event(rank, host.events[host.position])
            if wait is not None:
                return wait
            host.position += 1
        return None

    def _run_event(self, rank: int, event: LogEvent) -> ActorWait | None:
        """Run one event of a host; return the wait in which it is."""
        if isinstance(event, CollectiveRecord):
            return self._call_collective(rank, event)
        if isinstance(event, P2PBatchRecord):
            return self._call_batch(rank, event)
        stream = Actor(rank, event.stream)
        if isinstance(event, HostWait):
            return self._progress_wait(self._progress(stream, event.event, event.reason))
        if isinstance(event, StreamWait):
            self._queue(stream, self._progress(stream, event.event, "an event"))
        else:
            self.hosts[rank].recorded_events[event.event] = stream, len(self._queues[stream].items)
        return None

    def _progress(self, stream: Actor, event: int | None, reason: str) -> StreamProgress:
        """Return the end of an event, or of all items of a stream; an event never recorded is complete."""
        if event is None:
            return StreamProgress(stream, len(self._queues[stream].items), reason)
        return StreamProgress(*self.hosts[stream.rank].recorded_events.get(event, (stream, 0)), reason)

    def _progress_wait(self, wanted: StreamProgress) -> ActorWait | None:
        if self._queues[wanted.actor].completed_count >= wanted.completed_count:
            return None
        return ActorWait(
            wanted.actor, f"waits ({wanted.reason}) for stream {wanted.actor.stream}", lambda: [wanted.actor]
        )

    def _call_collective(self, rank: int, event: CollectiveRecord) -> ActorWait | None:
        communicator, members = self._group(event)
        if event.group != CONTROL_GROUP:
            connection = self._meeting((communicator, event.operation), members)
            self._enter(rank, connection)
            if not connection.is_complete:
                return connection.wait(f"connects {communicator} for its first {event.operation}")
        number, collective = self._next_rendezvous(rank, communicator, members)
        text = f"is in number {number + 1} on {communicator} ({event.purpose})"
        self._queue_operation(Actor(rank, event.stream), communicator, [(collective, text)])
        return None

    def _call_batch(self, rank: int, event: P2PBatchRecord) -> ActorWait | None:
        communicator, _ = self._group(event)
        messages = [each for each in channel_messages(communicator, rank, event) if each[1].peer in self.hosts]
        connections = {channel: self._meeting(channel, _ends(channel)) for channel, _ in messages}
        self._check_mutual_connection(rank, communicator, connections, event.code_location)
        for connection in connections.values():
            self._enter(rank, connection)
        for (_, source, target), connection in connections.items():
            if not connection.is_complete:
                text = f"connects rank {source} to rank {target} on {communicator} for its first message"
                return connection.wait(text)
        steps = []
        for channel, message in messages:
            does = "sends to" if channel[1] == rank else "receives from"
            text = f"{does} rank {message.peer} on {communicator} ({message.purpose})"
            steps.append((self._next_rendezvous(rank, channel, _ends(channel))[1], text))
        self._queue_operation(Actor(rank, event.stream), communicator, steps)
        return None

    def _check_mutual_connection(
        self, rank: int, communicator: Communicator, connections: Mapping[Channel, Rendezvous], place: str
    ) -> None:
        """Compare the first batches of two ranks that are both next and previous to each other."""
        new = [channel for channel, connection in connections.items() if rank not in connection.arrived]
        for peer in sorted({other for channel in new for other in channel[1:] if other != rank}):
            if not _is_next_and_previous(communicator, rank, peer):
                continue
            ours = frozenset(channel for channel in new if peer in channel[1:])
            theirs, their_place = self._pending_connections.pop((communicator, peer, rank), (None, ""))
            if theirs is None:
                self._pending_connections[communicator, rank, peer] = (ours, place)
            elif theirs != ours:
                first_batches = (peer, theirs, their_place), (rank, ours, place)
                self.findings.append(_connection_finding(communicator, *first_batches))
                for channel in ours | theirs:  # continue, to check the calls after the error too
                    for end in _ends(channel):
                        self._enter(end, self._meeting(channel, _ends(channel)))

    def _group(self, event: CollectiveRecord | P2PBatchRecord) -> tuple[Communicator, frozenset[int]]:
        """Return the communicator of an event and its rehearsed members.

        One object per communicator is shared, since identical objects are not compared rank by rank.
        """
        communicator = Communicator(event.group, event.ranks)
        if communicator not in self._groups:
            self._groups[communicator] = communicator, frozenset(event.ranks).intersection(self.hosts)
        return self._groups[communicator]

    def _meeting(self, key: Hashable, members: frozenset[int]) -> Rendezvous:
        if key not in self._rendezvous:
            self._rendezvous[key] = Rendezvous(members)
        return self._rendezvous[key]

    def _next_rendezvous(self, rank: int, key: Hashable, members: frozenset[int]) -> tuple[int, Rendezvous]:
        """Return the number of a rank's next collective or message, and its rendezvous."""
        number = self._call_counts[rank, key]
        self._call_counts[rank, key] += 1
        return number, self._meeting((key, number), members)

    def _enter(self, rank: int, rendezvous: Rendezvous) -> None:
        if rank not in rendezvous.arrived:
            rendezvous.arrived.add(rank)
            if rendezvous.is_complete:
                self._wake(rendezvous)

    def _queue_operation(
        self, stream: Actor, communicator: Communicator, steps: Sequence[tuple[Rendezvous, str]]
    ) -> None:
        order = self._launch_orders.setdefault((stream.rank, communicator), LaunchOrder(communicator))
        order.streams.append(stream)
        for rendezvous, _ in steps:
            rendezvous.stream_of_rank[stream.rank] = stream
        self._queue(stream, QueuedOperation(order, len(order.streams) - 1, steps))

    def _queue(self, stream: Actor, item: QueuedItem) -> None:
        queue = self._queues[stream]
        queue.items.append(item)
        if len(queue.items) == queue.completed_count + 1:
            self._ready.append(stream)

    def _run_stream(self, stream: Actor) -> ActorWait | None:
        queue = self._queues[stream]
        while queue.completed_count < len(queue.items):
            item = queue.items[queue.completed_count]
            wait = (
                self._progress_wait(item)
                if isinstance(item, StreamProgress)
                else self._run_operation(stream.rank, item)
            )
            if wait is not None:
                return wait
            queue.completed_count += 1
            if isinstance(item, QueuedOperation):
                item.order.ended_count += 1
                self._wake(item.order)
            self._wake(stream)
        return None

    def _run_operation(self, rank: int, item: QueuedOperation) -> ActorWait | None:
        """Start an operation on the device in its turn; return the wait in which it is."""
        order = item.order
        if order.ended_count < item.launch_index:
            text = f"waits for an earlier operation on {order.communicator}"
            return ActorWait(order, text, lambda: [order.streams[item.launch_index - 1]])
        for rendezvous, _ in item.steps:
            self._enter(rank, rendezvous)
        return next((rendezvous.wait(text) for rendezvous, text in item.steps if not rendezvous.is_complete), None)


def _host_events(log: RankLog) -> Iterator[LogEvent]:
    """Yield the events of a log; a collective over gloo is queued on a stream of its own, and the host waits for it."""
    for event in log.events:
        if isinstance(event, CollectiveRecord) and event.group == CONTROL_GROUP:
            yield replace(event, stream=CONTROL_GROUP)
            yield HostWait(None, CONTROL_GROUP, "a collective of the host", event.code_location)
        else:
            yield event


def _ends(channel: Channel) -> frozenset[int]:
    return frozenset(channel[1:])


def _is_next_and_previous(communicator: Communicator, rank: int, peer: int) -> bool:
    """Return whether a rank and its peer are opposite: both next and previous to each other."""
    ranks = communicator.ranks  # in NCCL's rounds of P2P, the rank to send to and the rank to receive from are then one
    return 2 * (ranks.index(rank) - ranks.index(peer)) % len(ranks) == 0


_FirstBatch = tuple[int, frozenset[Channel], str]


def _connection_finding(communicator: Communicator, *batches: _FirstBatch) -> RunFinding:
    has = "; ".join(f"the first batch of rank {rank} {_directions(rank, pairs)}" for rank, pairs, _ in batches)
    text = (
        f"on {communicator} the two ranks are both next and previous to each other, and NCCL connects both directions"
        f" with one record: {has}. It ends in an error; connect both directions in one batch first"
    )
    ranks = tuple(rank for rank, _, _ in batches)
    return RunFinding("first contact", ranks, text, tuple(place for _, _, place in batches))


def _directions(rank: int, pairs: frozenset[Channel]) -> str:
    does = {"sends" if source == rank else "receives" for _, source, _ in pairs}
    return " and ".join(sorted(does, reverse=True)) + (" only" if len(does) == 1 else "")
