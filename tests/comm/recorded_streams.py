"""Stand-ins for CUDA streams on a CPU: work runs immediately, and what it would have waited for is recorded."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor

from shoestring.comm.streams import Stream
from shoestring.comm.trace import EXPOSED_ALL_TO_ALL, TimelineTrack

HOST_WAITS = "the host waits"
REST = "rest of "


class RecordedEvent:
    """An event that completes when all of `behind` has run."""

    def __init__(self, behind: frozenset[str], streams: "RecordedStreams") -> None:
        self.behind = behind
        self._streams = streams

    def synchronize(self) -> None:
        """Record that the host waits: for what, and in which function."""
        self._streams.diary.append(HOST_WAITS)
        self._streams.host_waits_for.append(self.behind)
        self._streams.places[sys._getframe(1).f_code.co_qualname] += 1


class RecordedStream:
    """A stream that knows all work that has run when its queue is empty."""

    def __init__(self, streams: "RecordedStreams") -> None:
        self._streams = streams
        self.behind: frozenset[str] = frozenset()

    def record_event(self) -> RecordedEvent:
        """Record an event, see `Stream`."""
        return RecordedEvent(self.behind, self._streams)

    def wait_event(self, event: RecordedEvent) -> None:
        """Wait for an event, see `Stream`."""
        self.behind |= event.behind

    def synchronize(self) -> None:
        """Wait for the stream, see `Stream`."""


class RecordedStreams:
    """The `DeviceStreams` of a run and its `SpanRecorder`, whose spans are the work on the streams."""

    def __init__(self) -> None:
        self._current = RecordedStream(self)
        self.diary: list[str] = []
        """The host's queued work, launches and waits, in order."""
        self.needs: dict[str, frozenset[str]] = {}
        """All work that runs before each work, by name."""
        self.host_waits_for: list[frozenset[str]] = []
        self.places: Counter[str] = Counter()
        """Functions in which the host waits."""

    def create_stream(self, name: str) -> RecordedStream:
        """Create a stream, see `DeviceStreams`."""
        return RecordedStream(self)

    def current_stream(self) -> RecordedStream:
        """Return the current stream, see `DeviceStreams`."""
        return self._current

    @contextmanager
    def use_stream(self, stream: Stream) -> Iterator[None]:
        """Make a stream current, see `DeviceStreams`."""
        assert isinstance(stream, RecordedStream)
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        """Do nothing, see `DeviceStreams`."""

    def span(self, track: TimelineTrack, name: str, detail: object = None) -> AbstractContextManager[object]:
        """Record the work of a layer or a part of an exchange. The second span of an exchange is its second part."""
        if track is TimelineTrack.EXCHANGE:
            return self.queue(REST + name if name in self.needs else name)
        if track is TimelineTrack.COMPUTE and name != EXPOSED_ALL_TO_ALL:
            return self.queue(f"{name} of {detail}" if detail else name)
        return nullcontext()

    def record_instant(self, track: TimelineTrack, name: str, detail: object = None) -> None:
        """Record an instant, see `SpanRecorder`."""

    @contextmanager
    def queue(self, name: str) -> Iterator[None]:
        """Queue work on the stream that is current inside; events recorded there complete when the work has run."""
        self._current.behind |= {name}
        yield
        self.diary.append(name)
        self.needs[name] = self._current.behind - {name}
