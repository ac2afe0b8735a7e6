"""P2P channels: asynchronous messages between pipeline neighbors, one channel per direction."""

import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .async_comm import AsyncWork, FunctionWork, StreamCommunicator
from .errors import collective_error_context
from .groups import Group
from .streams import DeviceStreams, get_device_streams
from .trace import NULL_RECORDER, SpanRecorder, TimelineTrack


@dataclass(frozen=True)
class P2PSend:
    """A message to send. `description` becomes text only in an error or a timeline."""

    description: object
    tensor: Tensor
    peer: int


@dataclass(frozen=True)
class P2PReceive:
    """A message to receive into the tensor that `allocate` returns."""

    description: object
    allocate: Callable[[], Tensor]
    peer: int


class P2PChannel(Protocol):
    """Channel for one direction of the pipeline, over a separate group.

    Messages between two ranks arrive in the order in which they are sent, and both ends must post them in that order.
    A failed message raises `CollectiveError`.
    """

    def post(self, sends: Sequence[P2PSend], receives: Sequence[P2PReceive]) -> list[AsyncWork[Tensor]]:
        """Start all `sends` and `receives` without waiting; return the handles of the receives.

        A tensor to send is kept until it has been sent.
        """
        ...

    def wait_for_sends(self) -> None:
        """Wait until every posted send has finished."""
        ...

    def close(self) -> None:
        """Stop the thread or stream of the channel."""
        ...


def build_p2p_channel(
    group: Group,
    device: torch.device,
    recorder: SpanRecorder,
    track: TimelineTrack,
    streams: DeviceStreams | None = None,
) -> P2PChannel:
    """Return the channel for tensors on `device` over `group`; its spans go to `track`.

    `streams` defaults to those of `device`.
    """
    streams = streams or get_device_streams(device)
    if streams is not None:
        return NcclP2PChannel(group, StreamCommunicator(streams, recorder=recorder, track=track))
    return GlooP2PChannel(group, recorder, track)


class GlooP2PChannel:
    """Channel over gloo, whose threads move the messages: the computing thread posts them and waits for receives."""

    def __init__(
        self, group: Group, recorder: SpanRecorder = NULL_RECORDER, track: TimelineTrack = TimelineTrack.P2P_NEXT
    ) -> None:
        self._group, self._handle = group, group.process_group
        self._recorder, self._track = recorder, track
        self._sent: Counter[int] = Counter()
        self._received: Counter[int] = Counter()
        # Sends are waited for on another thread: a tensor must be kept until it is sent, and the computing thread must
        # not wait for a neighbor that is busy.
        self._sending: queue.Queue[tuple[P2PSend, dist.Work | None] | None] = queue.Queue()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._wait_for_each_send, name=track, daemon=True)
        self._thread.start()

    def post(self, sends: Sequence[P2PSend], receives: Sequence[P2PReceive]) -> list[AsyncWork[Tensor]]:
        """See `P2PChannel`."""
        # gloo matches messages by tag. The tag is the number of the message between the two ranks, which is equal at
        # both ends because both post in one order.
        arriving: list[AsyncWork[Tensor]] = []
        for incoming in receives:
            buffer, tag = incoming.allocate(), self._received[incoming.peer]
            with self._error_context(incoming):
                work = dist.irecv(buffer, incoming.peer, self._handle, tag)
            arriving.append(FunctionWork(partial(self._finish, incoming, work, buffer)))
            self._received[incoming.peer] += 1
        for outgoing in sends:
            with self._error_context(outgoing):
                work = dist.isend(outgoing.tensor, outgoing.peer, self._handle, self._sent[outgoing.peer])
            self._sending.put((outgoing, work))
            self._sent[outgoing.peer] += 1
        return arriving

    def wait_for_sends(self) -> None:
        """See `P2PChannel`."""
        self._sending.join()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """See `P2PChannel`."""
        self._sending.put(None)
        self._thread.join()

    def _wait_for_each_send(self) -> None:
        """Wait for one send after the other; after a failure for none."""
        while (sending := self._sending.get()) is not None:
            message, work = sending
            try:
                if self._failure is None:
                    with self._recorder.span(self._track, "send", message.description):
                        self._finish(message, work, message.tensor)
            except BaseException as failure:
                self._failure = failure
            del sending, message, work  # else the tensor stays allocated while `get` waits for the next message
            self._sending.task_done()

    def _finish(self, message: P2PSend | P2PReceive, work: dist.Work | None, tensor: Tensor) -> Tensor:
        """Wait for a posted message; return its `tensor`."""
        assert work is not None
        with self._error_context(message):
            work.wait(self._group.timeout)
        return tensor

    def _error_context(self, message: P2PSend | P2PReceive) -> AbstractContextManager[None]:
        """Turn errors into `CollectiveError`: gloo raises already at posting for a peer whose connection is closed."""
        return collective_error_context(self._group.rank, message.description, [message.peer], self._group.timeout)


class NcclP2PChannel:
    """Channel over NCCL: batches in order on a side stream. Not yet run on hardware."""

    def __init__(self, group: Group, async_communicator: StreamCommunicator) -> None:
        self._group, self._worker = group, async_communicator
        self._last: AsyncWork[tuple[Tensor, ...]] | None = None

    def post(self, sends: Sequence[P2PSend], receives: Sequence[P2PReceive]) -> list[AsyncWork[Tensor]]:
        """See `P2PChannel`."""
        if not sends and not receives:
            return []
        messages: list[P2PSend | P2PReceive] = [*sends, *receives]
        what = "; ".join(str(message.description) for message in messages)

        # One batch per call: NCCL runs the messages of a group together, so that a send cannot block the receive that
        # its peer waits for.
        def move() -> tuple[Tensor, ...]:
            # Allocated on the side stream, where they are written first.
            buffers = tuple(message.allocate() for message in receives)
            outgoing = [(each.tensor, each.peer) for each in sends]
            incoming = [(buffer, each.peer) for buffer, each in zip(buffers, receives, strict=True)]
            self._group.send_and_receive(outgoing, incoming, what)
            return buffers

        self._last = batch = self._worker.submit(what, move, [message.tensor for message in sends])

        def arrival(place: int) -> AsyncWork[Tensor]:
            return FunctionWork(lambda: batch.wait()[place])

        return [arrival(place) for place in range(len(receives))]

    def wait_for_sends(self) -> None:
        """See `P2PChannel`."""
        if self._last is not None:  # batches of one stream end in order, so the last one stands for all
            self._last.wait()

    def close(self) -> None:
        """See `P2PChannel`."""
        self._worker.close()
