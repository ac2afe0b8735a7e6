"""Streams and events of a rehearsed rank, identified in its log by names and numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from ....comm.streams import Stream
from ..log import StreamWait
from .recorder import COMPUTE_STREAM, RankRecorder


@dataclass(frozen=True)
class LoggedEvent:
    """Event on a stream."""

    recorder: RankRecorder
    number: int
    stream: str

    def synchronize(self) -> None:
        """See `comm.streams.Event`."""
        self.recorder.record_host_wait(self.number, self.stream, "event")


@dataclass(frozen=True)
class LoggedStream:
    """Stream, identified by its name."""

    recorder: RankRecorder
    name: str

    def record_event(self) -> LoggedEvent:
        """See `comm.streams.Stream`."""
        return LoggedEvent(self.recorder, self.recorder.record_event(self.name), self.name)

    def wait_event(self, event: LoggedEvent) -> None:
        """See `comm.streams.Stream`."""
        self.recorder.events.append(StreamWait(event.number, self.name))

    def synchronize(self) -> None:
        """See `comm.streams.Stream`."""
        self.recorder.record_host_wait(None, self.name, "synchronize")


class LoggedStreams:
    """`comm.streams.DeviceStreams` of a rehearsal. A number distinguishes streams that are created with one name."""

    def __init__(self, recorder: RankRecorder) -> None:
        self._recorder = recorder
        self._names = [COMPUTE_STREAM]

    def create_stream(self, name: str) -> Stream:
        """See `DeviceStreams`."""
        same = sum(taken == name or taken.startswith(f"{name} ") for taken in self._names)
        self._names.append(str(name) if not same else f"{name} {same + 1}")
        return LoggedStream(self._recorder, self._names[-1])

    def current_stream(self) -> Stream:
        """See `DeviceStreams`."""
        return LoggedStream(self._recorder, self._recorder.stream)

    @contextmanager
    def use_stream(self, stream: Stream) -> Iterator[None]:
        """See `DeviceStreams`."""
        assert isinstance(stream, LoggedStream)
        before, self._recorder.stream = self._recorder.stream, stream.name
        try:
            yield
        finally:
            self._recorder.stream = before

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        """See `DeviceStreams`; nothing to do, since memory is counted by live storages."""
