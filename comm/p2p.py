"""Messages between pipeline neighbors in one direction: nobody waits to post one."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .async_comm import AsyncWork, StreamCommunicator
from .errors import collective_error_context
from .groups import Group
from .streams import DeviceStreams, get_device_streams
from .trace import NULL_RECORDER, SpanRecorder, TimelineTrack


@dataclass(frozen=True)
class P2PSend:
    """A message to send. `what` is turned into text only for the error of one that fails, and for a timeline."""

    description: object
    tensor: Tensor
    peer: int


@dataclass(frozen=True)
class P2PReceive:
    """A message to receive, into what `make` makes."""

    description: object
    allocate: Callable[[], Tensor]
    peer: int


class P2PChannel(Protocol):
    """One direction, over a group of its own: neighbors send to each other at the same moment.

    Between two ranks messages arrive in the order in which they are sent; both ends must post them in that order.
    One that fails raises `CollectiveError`.
    """

    def post(self, sends: Sequence[P2PSend], receives: Sequence[P2PReceive]) -> list[AsyncWork[Tensor]]:
        """Start all of these, and return those that are received.

        What is sent is held until it has been sent, and no longer.
        """
        ...

    def wait_for_sends(self) -> None:
        """Wait until everything that was posted has been sent."""
        ...

    def close(self) -> None:
        """End what the lane runs on."""
        ...


def build_p2p_channel(
    group: Group,
    device: torch.device,
    recorder: SpanRecorder,
    track: TimelineTrack,
    streams: DeviceStreams | None = None,
) -> P2PChannel:
    """The lane for messages over `group` by tensors on `device`; it shows on `track` of a timeline.

    `streams` are those that it uses; by default those of `device`.
    """
    streams = streams or get_device_streams(device)
    if streams is not None:
        return NcclP2PChannel(group, StreamCommunicator(streams, recorder=recorder, track=track))
    return GlooP2PChannel(group, recorder, track)


class GlooP2PChannel:
    """Over gloo, which moves messages by itself: the computing thread posts them, and waits for those that it needs.

    A thread beside it waits for what is being sent, one after the other, to let go of it.
    """

    def __init__(
        self, group: Group, recorder: SpanRecorder = NULL_RECORDER, track: TimelineTrack = TimelineTrack.P2P_NEXT
    ) -> None:
        self._group, self._handle = group, group.process_group
        self._sent: Counter[int] = Counter()
        self._received: Counter[int] = Counter()
        self._leaving = _Leaving(recorder, track)

    def post(self, sends: Sequence[P2PSend], receives: Sequence[P2PReceive]) -> list[AsyncWork[Tensor]]:
        """See `P2PChannel`. Each message has a tag of its own, by its number between the two ranks."""
        arriving: list[AsyncWork[Tensor]] = []
        for incoming in receives:
            buffer, tag = incoming.allocate(), self._received[incoming.peer]
            with self._failing_clearly(incoming):
                work = dist.irecv(buffer, incoming.peer, self._handle, tag)
            arriving.append(_Moving(work, buffer, incoming.description, incoming.peer, self._group))
            self._received[incoming.peer] += 1
        for outgoing in sends:
            with self._failing_clearly(outgoing):
                work = dist.isend(outgoing.tensor, outgoing.peer, self._handle, self._sent[outgoing.peer])
            self._leaving.put(_Moving(work, outgoing.tensor, outgoing.description, outgoing.peer, self._group))
            self._sent[outgoing.peer] += 1
        return arriving

    def wait_for_sends(self) -> None:
        """See `P2PChannel`."""
        self._leaving.finish()

    def close(self) -> None:
        """See `P2PChannel`."""
        self._leaving.close()

    def _failing_clearly(self, message: P2PSend | P2PReceive) -> AbstractContextManager[None]:
        """gloo refuses to post to a neighbor that it knows is gone."""
        return collective_error_context(self._group.rank, message.description, [message.peer], self._group.timeout)


@dataclass(frozen=True)
class _Moving:
    """A message of gloo under way."""

    work: dist.Work | None
    tensor: Tensor
    what: object
    peer: int
    group: Group

    def wait(self) -> Tensor:
        assert self.work is not None
        with collective_error_context(self.group.rank, self.what, [self.peer], self.group.timeout):
            self.work.wait(self.group.timeout)
        return self.tensor


class _Leaving:
    """Holds what is being sent, until it has been sent. After a failure it waits for nothing more."""

    def __init__(self, recorder: SpanRecorder, track: TimelineTrack) -> None:
        self._recorder, self._track = recorder, track
        self._messages: queue.SimpleQueue[_Moving | threading.Event | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=track, daemon=True)
        self._thread.start()

    def put(self, message: _Moving) -> None:
        self._messages.put(message)

    def finish(self) -> None:
        """Wait for all that was put."""
        reached = threading.Event()
        self._messages.put(reached)
        reached.wait()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        self._messages.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (message := self._messages.get()) is not None:
            if isinstance(message, threading.Event):
                message.set()
            elif self._failure is None:
                self._wait(message)
            del message  # `get` may take long

    def _wait(self, message: _Moving) -> None:
        try:
            with self._recorder.span(self._track, "send", message.what):
                message.wait()
        except BaseException as failure:
            self._failure = failure


class NcclP2PChannel:
    """Over NCCL, batch after batch on a stream of its own. Not yet run on hardware."""

    def __init__(self, group: Group, async_communicator: StreamCommunicator) -> None:
        self._group, self._worker = group, async_communicator
        self._last: AsyncWork[tuple[Tensor, ...]] | None = None

    def post(self, sends: Sequence[P2PSend], receives: Sequence[P2PReceive]) -> list[AsyncWork[Tensor]]:
        """See `P2PChannel`."""
        if not sends and not receives:
            return []
        messages: list[P2PSend | P2PReceive] = [*sends, *receives]
        what = "; ".join(str(message.description) for message in messages)

        def move() -> tuple[Tensor, ...]:
            buffers = tuple(message.allocate() for message in receives)
            outgoing = [(each.tensor, each.peer) for each in sends]
            incoming = [(buffer, each.peer) for buffer, each in zip(buffers, receives, strict=True)]
            self._group.send_and_receive(outgoing, incoming, what)
            return buffers

        self._last = batch = self._worker.submit(what, move, [message.tensor for message in sends])
        return [_InBatch(batch, place) for place in range(len(receives))]

    def wait_for_sends(self) -> None:
        """See `P2PChannel`."""
        if self._last is not None:
            self._last.wait()

    def close(self) -> None:
        """See `P2PChannel`."""
        self._worker.close()


@dataclass(frozen=True)
class _InBatch:
    batch: AsyncWork[tuple[Tensor, ...]]
    place: int

    def wait(self) -> Tensor:
        return self.batch.wait()[self.place]
