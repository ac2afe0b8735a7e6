"""Streams and events of a rehearsed rank: names and numbers in its log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from torch import Tensor

from ....comm.streams import Stream
from .recorder import COMPUTE_STREAM, RankRecorder


@dataclass(frozen=True)
class LoggedEvent:
    """A point in the work of a stream."""

    recorder: RankRecorder
    number: int
    stream: str

    def synchronize(self) -> None:
        """See `comm.streams.Event`."""
        self.recorder.record_host_wait(self.number, self.stream, "event")

    def query(self) -> bool:
        """Return that it has happened: nothing is ever under way."""
        return True


@dataclass(frozen=True)
class LoggedStream:
    """A queue of work, known by its name."""

    recorder: RankRecorder
    name: str

    def record_event(self) -> LoggedEvent:
        """See `comm.streams.Stream`."""
        return LoggedEvent(self.recorder, self.recorder.record_event(self.name), self.name)

    def wait_event(self, event: LoggedEvent) -> None:
        """See `comm.streams.Stream`."""
        self.recorder.record_stream_wait(event.number, self.name)

    def synchronize(self) -> None:
        """See `comm.streams.Stream`."""
        self.recorder.record_host_wait(None, self.name, "synchronize")


class LoggedStreams:
    """Implements `comm.streams.Streams`. Two streams that are made with one name are told apart by a number."""

    def __init__(self, ledger: RankRecorder) -> None:
        self._ledger = ledger
        self._made = [COMPUTE_STREAM]
        self._current = LoggedStream(ledger, COMPUTE_STREAM)

    def create_stream(self, name: str) -> Stream:
        """See `Streams`."""
        same = sum(made == name or made.startswith(f"{name} ") for made in self._made)
        self._made.append(str(name) if not same else f"{name} {same + 1}")
        return LoggedStream(self._ledger, self._made[-1])

    def current_stream(self) -> Stream:
        """See `Streams`."""
        return self._current

    def use_stream(self, stream: Stream) -> AbstractContextManager[object]:
        """See `Streams`."""
        assert isinstance(stream, LoggedStream)
        return self._use(stream)

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        """See `Streams`. Memory is counted by what is alive."""

    @contextmanager
    def _use(self, stream: LoggedStream) -> Iterator[None]:
        before, self._current = self._current, stream
        self._ledger.stream = stream.name
        try:
            yield
        finally:
            self._current = before
            self._ledger.stream = before.name
