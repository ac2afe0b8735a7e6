"""Communication that advances without being waited on: a thread beside the computing one, or a stream of the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from .groups import Group
from .order import OrderCheck
from .record import SILENT, Recorder, Track
from .streams import Event, Streams, streams_of

T = TypeVar("T")
Result = TypeVar("Result", covariant=True)


class Pending(Protocol[Result]):
    """A communication under way."""

    def wait(self) -> Result:
        """Return what arrived, when it has. Never starts anything. A failed communication is raised here.

        On a GPU it is the current stream that waits, not this thread.
        """
        ...


class Worker(Protocol):
    """Runs whole exchanges in the order of submission, one after the other, without autograd."""

    def submit(self, what: str, function: Callable[[], T], inputs: Sequence[Tensor]) -> Pending[T]:
        """Start `function`, which reads `inputs`; `what` names it where orders are compared."""
        ...

    def close(self) -> None:
        """Let what was started finish; what has not started never will."""
        ...


def open_worker(
    group: Group,
    device: torch.device,
    order: OrderCheck | None = None,
    recorder: Recorder = SILENT,
    track: Track = Track.EXCHANGE,
    streams: Streams | None = None,
) -> Worker:
    """The worker for communication over `group` by tensors on `device`; it shows on `track` of a timeline.

    `streams` are those that it uses; by default those of `device`.
    """
    if group.size == 1:
        return InlineWorker(recorder, track)
    streams = streams or streams_of(device)
    if streams is not None:
        return StreamWorker(streams, order, recorder, track)
    return ThreadWorker(order, recorder, track)


class Done(Generic[T]):
    """A result that is already here."""

    def __init__(self, result: T) -> None:
        self._result = result

    def wait(self) -> T:
        """Return the result."""
        return self._result


class InlineWorker:
    """Runs everything at once, in the caller: for a group of one rank, where nothing moves."""

    def __init__(self, recorder: Recorder = SILENT, track: Track = Track.EXCHANGE) -> None:
        self._recorder, self._track = recorder, track

    def submit(self, what: str, function: Callable[[], T], inputs: Sequence[Tensor]) -> Pending[T]:
        """See `Worker`."""
        self._recorder.mark(Track.LAUNCH, what)
        with torch.no_grad(), self._recorder.span(self._track, what):
            return Done(function())

    def close(self) -> None:
        """Nothing is ever under way."""


class ThreadWorker:
    """A thread of its own for gloo, which has no streams.

    One thread, first in first out: all ranks of a group issue their collectives in one order, so none can wait for
    another for ever. After a failure nothing more is tried: each further collective would only wait for its limit too.
    """

    def __init__(
        self, order: OrderCheck | None = None, recorder: Recorder = SILENT, track: Track = Track.EXCHANGE
    ) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=track)
        self._order = order
        self._recorder, self._track = recorder, track
        self._failure: BaseException | None = None

    def submit(self, what: str, function: Callable[[], T], inputs: Sequence[Tensor]) -> Pending[T]:
        """See `Worker`."""
        self._recorder.mark(Track.LAUNCH, what)
        return _InThread(self._executor.submit(self._run, what, function))

    def close(self) -> None:
        """See `Worker`."""
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


class StreamWorker:
    """A stream beside the computing one. Not yet run on hardware.

    Each exchange gets an event of its own for what it needs and one for its end. The allocator is told of every tensor
    that crosses between the streams, so that its memory is not handed out while the other stream still uses it.
    """

    def __init__(
        self,
        streams: Streams,
        order: OrderCheck | None = None,
        recorder: Recorder = SILENT,
        track: Track = Track.EXCHANGE,
    ) -> None:
        self._streams = streams
        self._stream = streams.create(track)
        self._order = order
        self._recorder, self._track = recorder, track

    def submit(self, what: str, function: Callable[[], T], inputs: Sequence[Tensor]) -> Pending[T]:
        """See `Worker`. The host waits here for the sizes of a dispatch, and for nothing else."""
        if self._order is not None:
            self._order.check(what)
        self._recorder.mark(Track.LAUNCH, what)
        computed = self._streams.current().record_event()
        with torch.no_grad(), self._streams.use(self._stream), self._recorder.span(self._track, what):
            self._stream.wait_event(computed)
            result = function()
            arrived = self._stream.record_event()
        for tensor in inputs:
            self._streams.hold(tensor, self._stream)
        return _OnStream(result, arrived, self._streams)

    def close(self) -> None:
        """See `Worker`."""
        self._stream.synchronize()


class _OnStream(Generic[T]):
    def __init__(self, result: T, arrived: Event, streams: Streams) -> None:
        self._result = result
        self._streams = streams
        self._arrived = arrived

    def wait(self) -> T:
        stream = self._streams.current()
        stream.wait_event(self._arrived)
        for tensor in tensors_of(self._result):
            self._streams.hold(tensor, stream)
        return self._result


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors_of(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))
