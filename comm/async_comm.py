"""Asynchronous communication: on a worker thread for gloo, on a side stream for NCCL."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

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


@dataclass(frozen=True)
class FunctionWork(Generic[T]):
    """A communication in flight, as the function that waits for it."""

    wait: Callable[[], T]


class AsyncCommunicator(ABC):
    """Runs exchanges one after the other in the order of submission, without autograd."""

    def __init__(
        self,
        streams: DeviceStreams | None = None,
        order: CollectiveOrderCheck | None = None,
        recorder: SpanRecorder = NULL_RECORDER,
        track: TimelineTrack = TimelineTrack.EXCHANGE,
    ) -> None:
        """Take None for `streams` where tensors are on the host. Spans go to `track`."""
        self._order, self._recorder, self._track = order, recorder, track
        self._copies = AsyncHostCopier(streams)
        self._begun: str | None = None
        """Name of the submission whose second part is not launched yet."""

    def submit(self, what: str, function: Callable[[], T], inputs: Sequence[Tensor]) -> AsyncWork[T]:
        """Start `function`, which reads `inputs`. `what` names it in timelines, errors and the order check."""
        self._announce(what)
        return self._start(what, function, inputs)

    def submit_two_part(
        self, what: str, first: Callable[[], Callable[[], T]], inputs: Sequence[Tensor]
    ) -> TwoPartWork[T]:
        """Start `first`, which returns the second part; both read `inputs`.

        Raises `RuntimeError` for a submission between the two parts.
        """
        self._announce(what)
        self._begun = what
        start_second = self._start_first(what, first, inputs)

        def launch_second() -> AsyncWork[T]:
            self._begun = None
            return start_second()

        return TwoPartWork(launch_second)

    def copy_to_host_async(self, x: Tensor) -> AsyncHostCopy:
        """Start a copy of `x` to the host. The first part calls this and the second part waits for it."""
        return self._copies.start_copy(x)

    @abstractmethod
    def close(self) -> None:
        """Finish what has started and drop what has not."""

    @abstractmethod
    def _start(self, what: str, function: Callable[[], T], inputs: Sequence[Tensor]) -> AsyncWork[T]: ...

    @abstractmethod
    def _start_first(
        self, what: str, first: Callable[[], Callable[[], T]], inputs: Sequence[Tensor]
    ) -> Callable[[], AsyncWork[T]]:
        """Start the first part; return the function that starts the second."""

    def _announce(self, what: str) -> None:
        # A thread runs both parts in one go and a stream does not. Only if nothing comes in between do all ranks, and
        # all kinds of communicators, issue their collectives in the same order.
        if self._begun is not None:
            hint = "call `launch_second_part` first"
            raise RuntimeError(f"{what} is submitted before the second part of {self._begun}: {hint}")
        self._recorder.record_instant(TimelineTrack.LAUNCH, what)

    def _check_order(self, what: str) -> None:
        if self._order is not None:
            self._order.check(what)

    def _run(self, what: str, function: Callable[[], T]) -> T:
        with torch.no_grad(), self._recorder.span(self._track, what):
            return function()


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
        return InlineCommunicator(streams, None, recorder, track)
    if streams is not None:
        return StreamCommunicator(streams, order, recorder, track)
    return ThreadCommunicator(None, order, recorder, track)


class InlineCommunicator(AsyncCommunicator):
    """Runs everything in the calling thread: for a group of one rank, where no bytes move."""

    @override
    def close(self) -> None:
        """Do nothing: every call has finished when it returns."""

    @override
    def _start(self, what: str, function: Callable[[], T], inputs: Sequence[Tensor]) -> AsyncWork[T]:
        result = self._run(what, function)
        return FunctionWork(lambda: result)

    @override
    def _start_first(
        self, what: str, first: Callable[[], Callable[[], T]], inputs: Sequence[Tensor]
    ) -> Callable[[], AsyncWork[T]]:
        second = self._run(what, first)
        return lambda: self._start(what, second, inputs)


class ThreadCommunicator(AsyncCommunicator):
    """Runs exchanges on one worker thread: for gloo, which has no streams."""

    def __init__(
        self,
        streams: None = None,
        order: CollectiveOrderCheck | None = None,
        recorder: SpanRecorder = NULL_RECORDER,
        track: TimelineTrack = TimelineTrack.EXCHANGE,
    ) -> None:
        super().__init__(streams, order, recorder, track)
        # One thread, first in first out: all ranks of a group then issue their collectives in one order, which is what
        # keeps two ranks from waiting for each other.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=track)
        self._failure: BaseException | None = None

    @override
    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)

    @override
    def _start(self, what: str, function: Callable[[], T], inputs: Sequence[Tensor]) -> AsyncWork[T]:
        return FunctionWork(self._executor.submit(self._run, what, function).result)

    @override
    def _start_first(
        self, what: str, first: Callable[[], Callable[[], T]], inputs: Sequence[Tensor]
    ) -> Callable[[], AsyncWork[T]]:
        # The worker thread runs both parts: it waits for the numbers, and the computing thread does not.
        running = self._start(what, lambda: first()(), inputs)
        return lambda: running

    @override
    def _run(self, what: str, function: Callable[[], T]) -> T:
        # After a failure nothing is tried: each further collective would only wait for its timeout too.
        if self._failure is not None:
            raise self._failure
        try:
            self._check_order(what)
            return super()._run(what, function)
        except BaseException as failure:  # the future carries it to the computing thread, which raises it in `wait`
            self._failure = failure
            raise


class StreamCommunicator(AsyncCommunicator):
    """Runs exchanges on a side stream of the GPU; the host waits for nothing. Not yet run on hardware."""

    def __init__(
        self,
        streams: DeviceStreams,
        order: CollectiveOrderCheck | None = None,
        recorder: SpanRecorder = NULL_RECORDER,
        track: TimelineTrack = TimelineTrack.EXCHANGE,
    ) -> None:
        super().__init__(streams, order, recorder, track)
        self._streams, self._stream = streams, streams.create_stream(track)

    @override
    def close(self) -> None:
        self._stream.synchronize()

    @override
    def _start(self, what: str, function: Callable[[], T], inputs: Sequence[Tensor]) -> AsyncWork[T]:
        self._check_order(what)
        with self._on_side_stream(what, inputs, self._streams.current_stream().record_event()):
            return self._in_flight(function())

    @override
    def _start_first(
        self, what: str, first: Callable[[], Callable[[], T]], inputs: Sequence[Tensor]
    ) -> Callable[[], AsyncWork[T]]:
        self._check_order(what)
        with self._on_side_stream(what, inputs, self._streams.current_stream().record_event()):
            second = first()

        def start_second() -> AsyncWork[T]:
            # No second event: the products queued since the first part are what this exchange overlaps with.
            with self._on_side_stream(what, inputs, None):
                return self._in_flight(second())

        return start_second

    @contextmanager
    def _on_side_stream(self, what: str, inputs: Sequence[Tensor], computed: StreamEvent | None) -> Iterator[None]:
        """Queue the calls made inside, which read `inputs`, on the side stream, after the event `computed`."""
        with torch.no_grad(), self._streams.use_stream(self._stream), self._recorder.span(self._track, what):
            # An event, not a synchronization: the side stream waits for what the exchange reads and the host continues.
            if computed is not None:
                self._stream.wait_event(computed)
            yield
        # Memory belongs to the stream that allocated it: without this the allocator could give it to a new tensor of
        # that stream while the side stream still reads it.
        for tensor in inputs:
            self._streams.record_stream(tensor, self._stream)

    def _in_flight(self, result: T) -> AsyncWork[T]:
        arrived: StreamEvent = self._stream.record_event()

        def wait() -> T:
            stream = self._streams.current_stream()
            stream.wait_event(arrived)
            # The result was allocated on the side stream and is read on this one: the same hazard in the other
            # direction.
            for tensor in iter_tensors(result):
                self._streams.record_stream(tensor, stream)
            return result

        return FunctionWork(wait)


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
