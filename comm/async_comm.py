"""Asynchronous communication: on a worker thread for gloo, on a side stream for NCCL."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from .errors import CollectiveError
from .groups import Group
from .host_transfer import AsyncHostCopier, AsyncHostCopy
from .streams import DeviceStreams, StreamEvent, get_device_streams
from .trace import NULL_RECORDER, SpanRecorder, TimelineTrack


@dataclass
class CollectiveOrderCheck:
    """Debugging aid: compare the next exchange over a group before it runs. Costs one small collective per exchange."""

    group: Group
    issued: list[str] = field(default_factory=list)
    """Names of the exchanges that this rank has issued so far."""

    def check(self, what: str) -> None:
        """Raise `CollectiveError` on every rank unless all are about to run `what`."""
        self.issued.append(what)
        # The number is compared too: names repeat, so a rank that issued one exchange more could else go unnoticed.
        number = len(self.issued)
        calls = self.group.all_gather_objects((number, what), f"order check before {what}")
        # Without this error two ranks that disagree wait for each other until the collective timeout.
        if len(set(calls)) > 1:
            each = "; ".join(
                f"rank {rank} runs number {n}, {text}" for rank, (n, text) in zip(self.group.ranks, calls, strict=True)
            )
            raise CollectiveError(f"rank {self.group.rank}: the ranks disagree on the order of exchanges: {each}")


T = TypeVar("T")
Result = TypeVar("Result", covariant=True)


class AsyncWork(Protocol[Result]):
    """A communication in flight."""

    def wait(self) -> Result:
        """Wait for the communication, return its result, and raise its error here. Start nothing.

        On a GPU the current stream waits, not this thread.
        """
        ...


class TwoPartWork(Generic[T]):
    """A communication in two parts: the second needs numbers that the first copies to the host.

    The caller queues other work in between, so that the device computes while the host waits for the numbers.
    """

    def __init__(self, launch_second: Callable[[], AsyncWork[T]]) -> None:
        self._launch_second: Callable[[], AsyncWork[T]] | None = launch_second
        self._pending: AsyncWork[T] | None = None

    def launch_second_part(self) -> None:
        """Launch the second part unless it is launched. The host waits here for the numbers of the first part."""
        if self._launch_second is not None:
            launch_second, self._launch_second = self._launch_second, None  # frees what the second part reads
            self._pending = launch_second()

    def wait(self) -> T:
        """Launch the second part if that has not happened, then wait like `AsyncWork.wait`."""
        self.launch_second_part()
        assert self._pending is not None
        return self._pending.wait()


class AsyncCommunicator(Protocol):
    """Runs exchanges one after the other in the order of submission, without autograd."""

    def submit(self, what: str, function: Callable[[], T], inputs: Sequence[Tensor]) -> AsyncWork[T]:
        """Start `function`, which reads `inputs`. `what` names it in timelines, errors and the order check."""
        ...

    def submit_two_part(
        self, what: str, first: Callable[[], Callable[[], T]], inputs: Sequence[Tensor]
    ) -> TwoPartWork[T]:
        """Start `first`, which returns the second part; both read `inputs`.

        Raises `RuntimeError` for a submission between the two parts.
        """
        ...

    def copy_to_host_async(self, x: Tensor) -> AsyncHostCopy:
        """Start a copy of `x` to the host. The first part calls this and the second part waits for it."""
        ...

    def close(self) -> None:
        """Finish what has started and drop what has not."""
        ...


def build_async_communicator(
    group: Group,
    device: torch.device,
    order: CollectiveOrderCheck | None = None,
    recorder: SpanRecorder = NULL_RECORDER,
    track: TimelineTrack = TimelineTrack.EXCHANGE,
    streams: DeviceStreams | None = None,
) -> AsyncCommunicator:
    """Return the communicator for tensors on `device` over `group`; its spans go to `track`.

    `streams` defaults to those of `device`.
    """
    streams = streams or get_device_streams(device)
    if group.size == 1:
        return InlineCommunicator(recorder, track, streams)
    if streams is not None:
        return StreamCommunicator(streams, order, recorder, track)
    return ThreadCommunicator(order, recorder, track)


class CompletedWork(Generic[T]):
    """A finished communication and its result."""

    def __init__(self, result: T) -> None:
        self._result = result

    def wait(self) -> T:
        """Return the result."""
        return self._result


class _TwoPartGuard:
    """Raises for a submission between the two parts of another one."""

    def __init__(self) -> None:
        self._begun: str | None = None

    def submit(self, what: str) -> None:
        # A thread runs both parts in one go and a stream does not. Only if nothing comes in between do all ranks, and
        # all kinds of communicators, issue their collectives in the same order.
        if self._begun is not None:
            hint = "call `launch_second_part` first"
            raise RuntimeError(f"{what} is submitted before the second part of {self._begun}: {hint}")

    def begin(self, what: str) -> None:
        self.submit(what)
        self._begun = what

    def end(self) -> None:
        self._begun = None


class InlineCommunicator:
    """Runs everything in the calling thread: for a group of one rank, where no bytes move."""

    def __init__(
        self,
        recorder: SpanRecorder = NULL_RECORDER,
        track: TimelineTrack = TimelineTrack.EXCHANGE,
        streams: DeviceStreams | None = None,
    ) -> None:
        self._recorder, self._track = recorder, track
        self._copies, self._guard = AsyncHostCopier(streams), _TwoPartGuard()

    def submit(self, what: str, function: Callable[[], T], inputs: Sequence[Tensor]) -> AsyncWork[T]:
        """See `AsyncCommunicator`."""
        self._guard.submit(what)
        self._recorder.record_instant(TimelineTrack.LAUNCH, what)
        return CompletedWork(self._run(what, function))

    def submit_two_part(
        self, what: str, first: Callable[[], Callable[[], T]], inputs: Sequence[Tensor]
    ) -> TwoPartWork[T]:
        """See `AsyncCommunicator`."""
        self._guard.begin(what)
        self._recorder.record_instant(TimelineTrack.LAUNCH, what)
        second = self._run(what, first)

        def launch_second() -> AsyncWork[T]:
            self._guard.end()
            return CompletedWork(self._run(what, second))

        return TwoPartWork(launch_second)

    def copy_to_host_async(self, x: Tensor) -> AsyncHostCopy:
        """See `AsyncCommunicator`."""
        return self._copies.start_copy(x)

    def _run(self, what: str, function: Callable[[], T]) -> T:
        with torch.no_grad(), self._recorder.span(self._track, what):
            return function()

    def close(self) -> None:
        """Do nothing: every call has finished when it returns."""


class ThreadCommunicator:
    """Runs exchanges on one worker thread: for gloo, which has no streams."""

    def __init__(
        self,
        order: CollectiveOrderCheck | None = None,
        recorder: SpanRecorder = NULL_RECORDER,
        track: TimelineTrack = TimelineTrack.EXCHANGE,
    ) -> None:
        # One thread, first in first out: all ranks of a group then issue their collectives in one order, which is what
        # keeps two ranks from waiting for each other.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=track)
        self._order = order
        self._recorder, self._track = recorder, track
        self._failure: BaseException | None = None
        self._copies, self._guard = AsyncHostCopier(None), _TwoPartGuard()

    def submit(self, what: str, function: Callable[[], T], inputs: Sequence[Tensor]) -> AsyncWork[T]:
        """See `AsyncCommunicator`."""
        self._guard.submit(what)
        self._recorder.record_instant(TimelineTrack.LAUNCH, what)
        return _ThreadWork(self._executor.submit(self._run, what, function))

    def submit_two_part(
        self, what: str, first: Callable[[], Callable[[], T]], inputs: Sequence[Tensor]
    ) -> TwoPartWork[T]:
        """See `AsyncCommunicator`."""
        self._guard.begin(what)
        self._recorder.record_instant(TimelineTrack.LAUNCH, what)
        # The worker thread runs both parts: it waits for the numbers, and the computing thread does not.
        running = _ThreadWork(self._executor.submit(self._run, what, lambda: first()()))

        def launch_second() -> AsyncWork[T]:
            self._guard.end()
            return running

        return TwoPartWork(launch_second)

    def copy_to_host_async(self, x: Tensor) -> AsyncHostCopy:
        """See `AsyncCommunicator`."""
        return self._copies.start_copy(x)

    def close(self) -> None:
        """See `AsyncCommunicator`."""
        self._executor.shutdown(cancel_futures=True)

    def _run(self, what: str, function: Callable[[], T]) -> T:
        # After a failure nothing is tried: each further collective would only wait for its timeout too.
        if self._failure is not None:
            raise self._failure
        try:
            if self._order is not None:
                self._order.check(what)
            with torch.no_grad(), self._recorder.span(self._track, what):
                return function()
        except BaseException as failure:  # the future carries it to the computing thread, which raises it in `wait`
            self._failure = failure
            raise


class _ThreadWork(Generic[T]):
    def __init__(self, future: Future[T]) -> None:
        self._future = future

    def wait(self) -> T:
        return self._future.result()


class StreamCommunicator:
    """Runs exchanges on a side stream of the GPU. Not yet run on hardware."""

    def __init__(
        self,
        streams: DeviceStreams,
        order: CollectiveOrderCheck | None = None,
        recorder: SpanRecorder = NULL_RECORDER,
        track: TimelineTrack = TimelineTrack.EXCHANGE,
    ) -> None:
        self._streams = streams
        self._stream = streams.create_stream(track)
        self._order = order
        self._recorder, self._track = recorder, track
        self._copies, self._guard = AsyncHostCopier(streams), _TwoPartGuard()

    def submit(self, what: str, function: Callable[[], T], inputs: Sequence[Tensor]) -> AsyncWork[T]:
        """See `AsyncCommunicator`. The host waits for nothing here."""
        self._guard.submit(what)
        self._announce(what)
        # An event, not a synchronization: the side stream waits for what the exchange reads and the host continues.
        computed = self._streams.current_stream().record_event()
        with self._on_side_stream(what, inputs):
            self._stream.wait_event(computed)
            return _StreamWork(function(), self._stream.record_event(), self._streams)

    def submit_two_part(
        self, what: str, first: Callable[[], Callable[[], T]], inputs: Sequence[Tensor]
    ) -> TwoPartWork[T]:
        """See `AsyncCommunicator`."""
        self._guard.begin(what)
        self._announce(what)
        computed = self._streams.current_stream().record_event()
        with self._on_side_stream(what, inputs):
            self._stream.wait_event(computed)
            second = first()

        def launch_second() -> AsyncWork[T]:
            self._guard.end()
            # No second event: the products queued since the first part are what this exchange overlaps with.
            with self._on_side_stream(what, inputs):
                return _StreamWork(second(), self._stream.record_event(), self._streams)

        return TwoPartWork(launch_second)

    def copy_to_host_async(self, x: Tensor) -> AsyncHostCopy:
        """See `AsyncCommunicator`."""
        return self._copies.start_copy(x)

    def close(self) -> None:
        """See `AsyncCommunicator`."""
        self._stream.synchronize()

    def _announce(self, what: str) -> None:
        if self._order is not None:
            self._order.check(what)
        self._recorder.record_instant(TimelineTrack.LAUNCH, what)

    @contextmanager
    def _on_side_stream(self, what: str, inputs: Sequence[Tensor]) -> Iterator[None]:
        """Queue the calls made inside, which read `inputs`, on the side stream."""
        with torch.no_grad(), self._streams.use_stream(self._stream), self._recorder.span(self._track, what):
            yield
        # Memory belongs to the stream that allocated it: without this the allocator could give it to a new tensor of
        # that stream while the side stream still reads it.
        for tensor in inputs:
            self._streams.record_stream(tensor, self._stream)


class _StreamWork(Generic[T]):
    def __init__(self, result: T, arrived: StreamEvent, streams: DeviceStreams) -> None:
        self._result = result
        self._streams = streams
        self._arrived = arrived

    def wait(self) -> T:
        stream = self._streams.current_stream()
        stream.wait_event(self._arrived)
        # The result was allocated on the side stream and is read on this one: the same hazard in the other direction.
        for tensor in iter_tensors(self._result):
            self._streams.record_stream(tensor, stream)
        return self._result


def iter_tensors(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested tuples and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from iter_tensors(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from iter_tensors(getattr(value, field.name))
