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
from .errors import failing_clearly
from .groups import Group
from .streams import Streams, streams_of
from .trace import SILENT, SpanRecorder, Track


@dataclass(frozen=True)
class Outgoing:
    """A message to send. `what` is turned into text only for the error of one that fails, and for a timeline."""

    what: object
    tensor: Tensor
    peer: int


@dataclass(frozen=True)
class Incoming:
    """A message to receive, into what `make` makes."""

    what: object
    make: Callable[[], Tensor]
    peer: int


class P2PChannel(Protocol):
    """One direction, over a group of its own: neighbors send to each other at the same moment.

    Between two ranks messages arrive in the order in which they are sent; both ends must post them in that order.
    One that fails raises `CollectiveError`.
    """

    def post(self, sends: Sequence[Outgoing], receives: Sequence[Incoming]) -> list[AsyncWork[Tensor]]:
        """Start all of these, and return those that are received.

        What is sent is held until it has been sent, and no longer.
        """
        ...

    def finish(self) -> None:
        """Wait until everything that was posted has been sent."""
        ...

    def close(self) -> None:
        """End what the lane runs on."""
        ...


def open_lane(
    group: Group, device: torch.device, recorder: SpanRecorder, track: Track, streams: Streams | None = None
) -> P2PChannel:
    """The lane for messages over `group` by tensors on `device`; it shows on `track` of a timeline.

    `streams` are those that it uses; by default those of `device`.
    """
    streams = streams or streams_of(device)
    if streams is not None:
        return StreamChannel(group, StreamCommunicator(streams, recorder=recorder, track=track))
    return SocketChannel(group, recorder, track)


class SocketChannel:
    """Over gloo, which moves messages by itself: the computing thread posts them, and waits for those that it needs.

    A thread beside it waits for what is being sent, one after the other, to let go of it.
    """

    def __init__(self, group: Group, recorder: SpanRecorder = SILENT, track: Track = Track.UP) -> None:
        self._group, self._handle = group, group.handle
        self._sent: Counter[int] = Counter()
        self._received: Counter[int] = Counter()
        self._leaving = _Leaving(recorder, track)

    def post(self, sends: Sequence[Outgoing], receives: Sequence[Incoming]) -> list[AsyncWork[Tensor]]:
        """See `P2PChannel`. Each message has a tag of its own, by its number between the two ranks."""
        arriving: list[AsyncWork[Tensor]] = []
        for incoming in receives:
            buffer, tag = incoming.make(), self._received[incoming.peer]
            with self._failing_clearly(incoming):
                work = dist.irecv(buffer, incoming.peer, self._handle, tag)
            arriving.append(_Moving(work, buffer, incoming.what, incoming.peer, self._group))
            self._received[incoming.peer] += 1
        for outgoing in sends:
            with self._failing_clearly(outgoing):
                work = dist.isend(outgoing.tensor, outgoing.peer, self._handle, self._sent[outgoing.peer])
            self._leaving.put(_Moving(work, outgoing.tensor, outgoing.what, outgoing.peer, self._group))
            self._sent[outgoing.peer] += 1
        return arriving

    def finish(self) -> None:
        """See `P2PChannel`."""
        self._leaving.finish()

    def close(self) -> None:
        """See `P2PChannel`."""
        self._leaving.close()

    def _failing_clearly(self, message: Outgoing | Incoming) -> AbstractContextManager[None]:
        """gloo refuses to post to a neighbor that it knows is gone."""
        return failing_clearly(self._group.rank, message.what, [message.peer], self._group.limit)


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
        with failing_clearly(self.group.rank, self.what, [self.peer], self.group.limit):
            self.work.wait(self.group.limit)
        return self.tensor


class _Leaving:
    """Holds what is being sent, until it has been sent. After a failure it waits for nothing more."""

    def __init__(self, recorder: SpanRecorder, track: Track) -> None:
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


class StreamChannel:
    """Over NCCL, batch after batch on a stream of its own. Not yet run on hardware."""

    def __init__(self, group: Group, worker: StreamCommunicator) -> None:
        self._group, self._worker = group, worker
        self._last: AsyncWork[tuple[Tensor, ...]] | None = None

    def post(self, sends: Sequence[Outgoing], receives: Sequence[Incoming]) -> list[AsyncWork[Tensor]]:
        """See `P2PChannel`."""
        if not sends and not receives:
            return []
        messages: list[Outgoing | Incoming] = [*sends, *receives]
        what = "; ".join(str(message.what) for message in messages)

        def move() -> tuple[Tensor, ...]:
            buffers = tuple(message.make() for message in receives)
            outgoing = [(each.tensor, each.peer) for each in sends]
            incoming = [(buffer, each.peer) for buffer, each in zip(buffers, receives, strict=True)]
            self._group.send_and_receive(outgoing, incoming, what)
            return buffers

        self._last = batch = self._worker.submit(what, move, [message.tensor for message in sends])
        return [_InBatch(batch, place) for place in range(len(receives))]

    def finish(self) -> None:
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
