"""Communication that advances without being waited on: a thread beside the computing one, or a stream of the GPU.

`CollectiveOrderCheck` is a debugging aid: every rank of a group issues the same exchanges in the same order, or all of them say
who does not. Without it, two ranks that disagree wait for each other until the limit.
"""

from __future__ import annotations

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
    """Compares exchanges over a group before they run; costs one small collective each."""

    group: Group
    issued: list[str] = field(default_factory=list)
    """What this rank has issued so far."""

    def check(self, what: str) -> None:
        """Raise `CollectiveError` on every rank unless all are about to run `what`."""
        self.issued.append(what)
        number = len(self.issued)
        calls = self.group.all_gather_objects((number, what), f"order check before {what}")
        if len(set(calls)) > 1:
            each = "; ".join(
                f"rank {rank} runs number {n}, {text}" for rank, (n, text) in zip(self.group.ranks, calls, strict=True)
            )
            raise CollectiveError(f"rank {self.group.rank}: the ranks disagree on the order of exchanges: {each}")


T = TypeVar("T")
Result = TypeVar("Result", covariant=True)


class AsyncWork(Protocol[Result]):
    """A communication under way."""

    def wait(self) -> Result:
        """Return what arrived, when it has. Never starts anything. A failed communication is raised here.

        On a GPU it is the current stream that waits, not this thread.
        """
        ...


class TwoPartWork(Generic[T]):
    """A communication in two parts, the second of which needs numbers that the first one brings to the host.

    Between them the caller queues other work, so that the device has some while the host waits for the numbers.
    """

    def __init__(self, proceed: Callable[[], AsyncWork[T]]) -> None:
        self._proceed: Callable[[], AsyncWork[T]] | None = proceed
        self._pending: AsyncWork[T] | None = None

    def launch_second_part(self) -> None:
        """Launch the second part, unless that is done. The host waits here for the numbers of the first."""
        if self._proceed is not None:
            proceed, self._proceed = self._proceed, None  # lets go of what the second part reads
            self._pending = proceed()

    def wait(self) -> T:
        """Return what arrived, see `AsyncWork`; launches the second part where `proceed` has not."""
        self.launch_second_part()
        assert self._pending is not None
        return self._pending.wait()


class AsyncCommunicator(Protocol):
    """Runs whole exchanges in the order of submission, one after the other, without autograd."""

    def submit(self, what: str, function: Callable[[], T], inputs: Sequence[Tensor]) -> AsyncWork[T]:
        """Start `function`, which reads `inputs`; `what` names it where orders are compared."""
        ...

    def submit_two_part(
        self, what: str, first: Callable[[], Callable[[], T]], inputs: Sequence[Tensor]
    ) -> TwoPartWork[T]:
        """Start `first`, which returns the second part; both read `inputs`.

        Nothing may be submitted between the parts: then all kinds of workers, of which one runs both at once, issue
        their collectives in the same order.
        """
        ...

    def copy_to_host_async(self, x: Tensor) -> AsyncHostCopy:
        """Start a copy of `x` to the host: by the first part, to be waited for by the second."""
        ...

    def close(self) -> None:
        """Let what was started finish; what has not started never will."""
        ...


def build_async_communicator(
    group: Group,
    device: torch.device,
    order: CollectiveOrderCheck | None = None,
    recorder: SpanRecorder = NULL_RECORDER,
    track: TimelineTrack = TimelineTrack.EXCHANGE,
    streams: DeviceStreams | None = None,
) -> AsyncCommunicator:
    """The worker for communication over `group` by tensors on `device`; it shows on `track` of a timeline.

    `streams` are those that it uses; by default those of `device`.
    """
    streams = streams or get_device_streams(device)
    if group.size == 1:
        return InlineCommunicator(recorder, track, streams)
    if streams is not None:
        return StreamCommunicator(streams, order, recorder, track)
    return ThreadCommunicator(order, recorder, track)


class CompletedWork(Generic[T]):
    """A result that is already here."""

    def __init__(self, result: T) -> None:
        self._result = result

    def wait(self) -> T:
        """Return the result."""
        return self._result


class _Parts:
    """Refuses a submission between the two parts of another one."""

    def __init__(self) -> None:
        self._begun: str | None = None

    def submit(self, what: str) -> None:
        if self._begun is not None:
            raise RuntimeError(f"{what} is submitted before the second part of {self._begun}: call `proceed` first")

    def begin(self, what: str) -> None:
        self.submit(what)
        self._begun = what

    def end(self) -> None:
        self._begun = None


class InlineCommunicator:
    """Runs everything at once, in the caller: for a group of one rank, where nothing moves."""

    def __init__(
        self,
        recorder: SpanRecorder = NULL_RECORDER,
        track: TimelineTrack = TimelineTrack.EXCHANGE,
        streams: DeviceStreams | None = None,
    ) -> None:
        self._recorder, self._track = recorder, track
        self._copies, self._parts = AsyncHostCopier(streams), _Parts()

    def submit(self, what: str, function: Callable[[], T], inputs: Sequence[Tensor]) -> AsyncWork[T]:
        """See `AsyncCommunicator`."""
        self._parts.submit(what)
        self._recorder.record_instant(TimelineTrack.LAUNCH, what)
        return CompletedWork(self._run(what, function))

    def submit_two_part(
        self, what: str, first: Callable[[], Callable[[], T]], inputs: Sequence[Tensor]
    ) -> TwoPartWork[T]:
        """See `AsyncCommunicator`."""
        self._parts.begin(what)
        self._recorder.record_instant(TimelineTrack.LAUNCH, what)
        second = self._run(what, first)

        def proceed() -> AsyncWork[T]:
            self._parts.end()
            return CompletedWork(self._run(what, second))

        return TwoPartWork(proceed)

    def copy_to_host_async(self, x: Tensor) -> AsyncHostCopy:
        """See `AsyncCommunicator`."""
        return self._copies.start_copy(x)

    def _run(self, what: str, function: Callable[[], T]) -> T:
        with torch.no_grad(), self._recorder.span(self._track, what):
            return function()

    def close(self) -> None:
        """Nothing is ever under way."""


class ThreadCommunicator:
    """A thread of its own for gloo, which has no streams.

    One thread, first in first out: all ranks of a group issue their collectives in one order, so none can wait for
    another for ever. After a failure nothing more is tried: each further collective would only wait for its limit too.
    """

    def __init__(
        self,
        order: CollectiveOrderCheck | None = None,
        recorder: SpanRecorder = NULL_RECORDER,
        track: TimelineTrack = TimelineTrack.EXCHANGE,
    ) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=track)
        self._order = order
        self._recorder, self._track = recorder, track
        self._failure: BaseException | None = None
        self._copies, self._parts = AsyncHostCopier(None), _Parts()

    def submit(self, what: str, function: Callable[[], T], inputs: Sequence[Tensor]) -> AsyncWork[T]:
        """See `AsyncCommunicator`."""
        self._parts.submit(what)
        self._recorder.record_instant(TimelineTrack.LAUNCH, what)
        return _InThread(self._executor.submit(self._run, what, function))

    def submit_two_part(
        self, what: str, first: Callable[[], Callable[[], T]], inputs: Sequence[Tensor]
    ) -> TwoPartWork[T]:
        """See `AsyncCommunicator`. The thread starts the second part: it waits for numbers instead of the caller.

        The order of collectives is that of a stream, because nothing comes between the parts.
        """
        self._parts.begin(what)
        self._recorder.record_instant(TimelineTrack.LAUNCH, what)
        running = _InThread(self._executor.submit(self._run, what, lambda: first()()))

        def proceed() -> AsyncWork[T]:
            self._parts.end()
            return running

        return TwoPartWork(proceed)

    def copy_to_host_async(self, x: Tensor) -> AsyncHostCopy:
        """See `AsyncCommunicator`."""
        return self._copies.start_copy(x)

    def close(self) -> None:
        """See `AsyncCommunicator`."""
        self._executor.shutdown(cancel_futures=True)

    def _run(self, what: str, function: Callable[[], T]) -> T:
        if self._failure is not None:
            raise self._failure
        try:
            if self._order is not None:
                self._order.check(what)
            with torch.no_grad(), self._recorder.span(self._track, what):
                return function()
        except BaseException as failure:
            self._failure = failure
            raise


class _InThread(Generic[T]):
    def __init__(self, future: Future[T]) -> None:
        self._future = future

    def wait(self) -> T:
        return self._future.result()


class StreamCommunicator:
    """A stream beside the computing one. Not yet run on hardware.

    Each exchange gets an event of its own for what it needs and one for its end. The allocator is told of every tensor
    that crosses between the streams, so that its memory is not handed out while the other stream still uses it.
    """

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
        self._copies, self._parts = AsyncHostCopier(streams), _Parts()

    def submit(self, what: str, function: Callable[[], T], inputs: Sequence[Tensor]) -> AsyncWork[T]:
        """See `AsyncCommunicator`. The host waits for nothing here."""
        self._parts.submit(what)
        self._announce(what)
        computed = self._streams.current_stream().record_event()
        with self._queueing(what, inputs):
            self._stream.wait_event(computed)
            return _OnStream(function(), self._stream.record_event(), self._streams)

    def submit_two_part(
        self, what: str, first: Callable[[], Callable[[], T]], inputs: Sequence[Tensor]
    ) -> TwoPartWork[T]:
        """See `AsyncCommunicator`. The second part waits for nothing that was computed since the first."""
        self._parts.begin(what)
        self._announce(what)
        computed = self._streams.current_stream().record_event()
        with self._queueing(what, inputs):
            self._stream.wait_event(computed)
            second = first()

        def proceed() -> AsyncWork[T]:
            self._parts.end()
            with self._queueing(what, inputs):
                return _OnStream(second(), self._stream.record_event(), self._streams)

        return TwoPartWork(proceed)

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
    def _queueing(self, what: str, inputs: Sequence[Tensor]) -> Iterator[None]:
        """Queue on the worker's stream what reads `inputs`."""
        with torch.no_grad(), self._streams.use_stream(self._stream), self._recorder.span(self._track, what):
            yield
        for tensor in inputs:
            self._streams.record_stream(tensor, self._stream)


class _OnStream(Generic[T]):
    def __init__(self, result: T, arrived: StreamEvent, streams: DeviceStreams) -> None:
        self._result = result
        self._streams = streams
        self._arrived = arrived

    def wait(self) -> T:
        stream = self._streams.current_stream()
        stream.wait_event(self._arrived)
        for tensor in iter_tensors(self._result):
            self._streams.record_stream(tensor, stream)
        return self._result


def iter_tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from iter_tensors(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from iter_tensors(getattr(value, field.name))
