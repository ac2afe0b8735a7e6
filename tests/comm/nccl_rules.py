"""NCCL's rules on CPUs: stand-ins for CUDA streams and NCCL communicators over gloo.

With these the classes that GPUs use (`NcclP2PChannel`, `StreamCommunicator`) run in tests. The rules:

* A pair's first message, and a group's first collective of each algorithm, block the calling thread until all members
  have made the matching call (NCCL 2.30: `ncclTransportP2pSetup` in transport.cc, `ncclCollPreconnect` in group.cc).
* Every other call only queues. Waiting for it holds a stream, and the host when it computes on that stream.
* Calls on one communicator run in the order in which they were launched.
* A batch of messages ends when all of them are matched.
* Two ranks that are next and previous to each other swap their connections in one message. An end that connects fewer
  channels than the other gets a message of another length, which is an error.

A CPU computes at once, in the host thread. So what a stream of a GPU would hold back holds the host: not where it waits
for an event, but at the first tensor operation behind it, which `Eager` sees. Posting alone never blocks.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from shoestring.comm.communicator import Collectives, GlooCollectives, PeerTensors
from shoestring.comm.group_factory import GlooGroupFactory
from shoestring.comm.groups import Group
from shoestring.comm.streams import Stream
from shoestring.tests.processes import World

CONNECT, COLLECT = 1 << 10, 1 << 20
"""Tags of the messages by which pairs and algorithms connect; data has tag 0."""
TREE, RING = 0, 1
"""Algorithms: a small collective goes over a tree, a larger one round the ring."""
RING_BYTES = 1024
_LIMIT = timedelta(seconds=60)
FIRST_CONTACT, TRUNCATED = "first contact", "message truncated"


@dataclass(frozen=True)
class QueuedEvent:
    """A point in a stream: the communications that must end before it."""

    parts: tuple[Future[None], ...]

    def synchronize(self) -> None:
        """Block the calling thread until they have ended; raise the error that one of them raised."""
        for part in self.parts:
            part.result()


class QueuedStream:
    """A queue of communications. Compute adds nothing: it is done by the time the host continues."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._last: tuple[Future[None], ...] = ()

    def record_event(self) -> QueuedEvent:
        """Record an event, see `Stream`."""
        return QueuedEvent(self._last)

    def wait_event(self, event: QueuedEvent) -> None:
        """Wait for an event, see `Stream`."""
        self._last = tuple(dict.fromkeys((*self._last, *event.parts)))

    def queue(self, communication: Future[None]) -> None:
        """Queue everything that follows on the stream behind `communication`."""
        self._last = (communication,)

    def synchronize(self) -> None:
        """Wait for the stream, see `Stream`."""
        self.record_event().synchronize()
        self._last = ()


class QueuedStreams:
    """The `DeviceStreams` of a CPU."""

    def __init__(self) -> None:
        self._main = QueuedStream("main")
        self._thread = threading.local()

    def create_stream(self, name: str) -> QueuedStream:
        """Create a stream, see `DeviceStreams`."""
        return QueuedStream(name)

    def current_stream(self) -> QueuedStream:
        """Return the current stream, see `DeviceStreams`."""
        stream: QueuedStream = getattr(self._thread, "stream", self._main)
        return stream

    @contextmanager
    def use_stream(self, stream: Stream) -> Iterator[None]:
        """Make a stream current, see `DeviceStreams`."""
        before = self.current_stream()
        self._thread.stream = stream
        try:
            yield
        finally:
            self._thread.stream = before

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        """Do nothing: a communication keeps the tensors that it moves, see `DeviceStreams`."""


class Eager(TorchDispatchMode):
    """Blocks the host at each tensor operation until the current stream is empty: the operation is queued behind it.

    What only describes a tensor (views, empty ones) is the host's alone, on a GPU too.
    """

    def __init__(self, streams: QueuedStreams) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._streams = streams

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        if not function.is_view and "empty" not in function.__name__:
            self._streams.current_stream().synchronize()
        return function(*args, **(kwargs or {}))


class Reading(TorchFunctionMode):
    """Blocks the host at `tolist`, which reads a CPU tensor without an operation."""

    def __init__(self, streams: QueuedStreams) -> None:
        super().__init__()
        self._streams = streams

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call one function."""
        if function is Tensor.tolist:
            self._streams.current_stream().synchronize()
        return function(*args, **(kwargs or {}))


@contextmanager
def computing_behind(streams: QueuedStreams) -> Iterator[None]:
    """Queue this thread's tensor operations behind its current stream."""
    with Eager(streams), Reading(streams):
        yield


class NeverConnected(RuntimeError):  # noqa: N818 -- says what happened
    """A first contact whose peer never came, or came with another number of channels."""


@dataclass
class Connections:
    """The connections of one rank in one communicator. Every method blocks the calling thread."""

    handle: dist.ProcessGroup
    ranks: tuple[int, ...]
    rank: int
    patience: timedelta
    """Longest wait for a peer."""
    _targets: set[int] = field(default_factory=set)
    _sources: set[int] = field(default_factory=set)
    _algorithms: set[int] = field(default_factory=set)
    _posted: list[tuple[Any, Tensor]] = field(default_factory=list)
    """Sends whose peers may receive them at any later time."""

    def pairs(self, targets: Iterable[int], sources: Iterable[int]) -> None:
        """Connect to the ranks that this one sends to and receives from for the first time.

        Peers at distance 1, 2, … come one after the other, as in NCCL; each gets the number of channels to connect.
        """
        here, size = self.ranks.index(self.rank), len(self.ranks)
        new_targets = set(targets) - self._targets - {self.rank}
        new_sources = set(sources) - self._sources - {self.rank}
        self._targets |= new_targets
        self._sources |= new_sources
        for distance in range(1, size):
            target, source = self.ranks[(here + distance) % size], self.ranks[(here - distance) % size]
            sends, receives = target in new_targets, source in new_sources
            if target == source:
                self._meet([(target, sends + receives)], CONNECT + distance)
            else:
                self._meet([(source, int(receives)), (target, int(sends))], CONNECT + distance)

    def collective(self, size: int) -> None:
        """Connect what a collective of `size` bytes goes over, if it is the first such one."""
        algorithm = RING if size >= RING_BYTES else TREE
        if algorithm not in self._algorithms:
            self._algorithms.add(algorithm)
            self._meet([(rank, 1) for rank in self.ranks if rank != self.rank], COLLECT + algorithm)

    def _meet(self, peers: Sequence[tuple[int, int]], tag: int) -> None:
        """Send each peer the number of channels that connect here, and wait until it has sent the same number."""
        coming = [(peer, channels) for peer, channels in peers if channels]
        for peer, channels in coming:
            word = torch.tensor([channels])
            self._posted.append((dist.isend(word, peer, self.handle, tag), word))
        for peer, channels in coming:
            word = torch.zeros(1, dtype=torch.int64)
            receiving = dist.irecv(word, peer, self.handle, tag)
            assert receiving is not None
            try:
                receiving.wait(self.patience)
            except RuntimeError as error:
                raise NeverConnected(f"{FIRST_CONTACT} with rank {peer}, which does not come") from error
            if int(word) != channels:
                raise NeverConnected(f"{TRUNCATED}: {channels} channels here, {int(word)} on rank {peer}")


class RulesCommunicator(Collectives):
    """Gloo's collectives under NCCL's rules, run one after the other in a separate thread."""

    def __init__(
        self,
        handle: dist.ProcessGroup,
        ranks: tuple[int, ...],
        rank: int,
        limit: timedelta,
        streams: QueuedStreams,
        patience: timedelta,
    ) -> None:
        super().__init__(handle)
        self._gloo = GlooCollectives(handle, ranks, rank, limit)
        self._ranks = ranks
        self._streams = streams
        self._connections = Connections(handle, ranks, rank, patience)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="communicator")

    def all_reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        """Sum over the ranks, see `Collectives`."""
        self._connections.collective(tensor.nbytes)
        self._queue(lambda: self._gloo.all_reduce(tensor, operation))

    def all_to_all(self, arrived: Tensor, sent: Tensor, received_M: Sequence[int], sent_M: Sequence[int]) -> None:
        """Send rows to every rank, see `Collectives`. A message without rows is not sent."""
        self._connections.pairs(
            [rank for rank, rows in zip(self._ranks, sent_M, strict=True) if rows],
            [rank for rank, rows in zip(self._ranks, received_M, strict=True) if rows],
        )
        self._queue(lambda: self._gloo.all_to_all(arrived, sent, received_M, sent_M))

    def reduce_scatter(self, own_N: Tensor, shards_GN: Tensor) -> None:
        """Sum and scatter, see `Collectives`."""
        self._connections.collective(shards_GN.nbytes)
        self._queue(lambda: self._gloo.reduce_scatter(own_N, shards_GN))

    def all_gather(self, shards_GN: Tensor, own_N: Tensor) -> None:
        """Gather from all ranks, see `Collectives`."""
        self._connections.collective(shards_GN.nbytes)
        self._queue(lambda: self._gloo.all_gather(shards_GN, own_N))

    def send_and_receive(self, sends: PeerTensors, receives: PeerTensors) -> None:
        """Send to and receive from peers, see `Collectives`."""
        self._connections.pairs([peer for _, peer in sends], [peer for _, peer in receives])
        self._queue(lambda: self._gloo.send_and_receive(sends, receives))

    def _queue(self, work: Callable[[], None]) -> None:
        """Run `work` behind the current stream and earlier calls; the stream then waits for it."""
        stream = self._streams.current_stream()
        computed = stream.record_event()

        def run() -> None:
            computed.synchronize()
            with torch.no_grad():
                work()

        stream.queue(self._thread.submit(run))


class RulesGroups(GlooGroupFactory):
    """A factory of groups whose communicators follow NCCL's rules; the group of host tensors is gloo's."""

    def __init__(self, rank: int, limit: timedelta, streams: QueuedStreams, patience: timedelta) -> None:
        """Set `patience`, the longest first contact, and `limit`, the longest communication."""
        super().__init__(rank, limit)
        self._streams, self._patience = streams, patience

    def create_world_cpu(self, ranks: tuple[int, ...], world: Collectives | None) -> Collectives:
        """Create the group of host tensors, see `GroupFactory`."""
        communicator = super().split_group("control", [ranks], None)
        assert communicator is not None
        return communicator

    def split_group(self, name: str, parts: Sequence[tuple[int, ...]], max_ctas: int | None) -> Collectives | None:
        """Split the default group, see `GroupFactory`."""
        own = super().split_group(name, parts, max_ctas)
        if own is None:
            return None
        ranks = next(part for part in parts if self._rank in part)
        return RulesCommunicator(own.process_group, ranks, self._rank, self._limit, self._streams, self._patience)


def open_group(world: World, streams: QueuedStreams, patience: float = 60) -> Group:
    everyone = tuple(range(world.size))
    make = RulesGroups(world.rank, _LIMIT, streams, timedelta(seconds=patience))
    return Group(everyone, make.split_group("all", [everyone], None), world.rank, _LIMIT)
