"""Sink that runs in a background thread, so that a slow server costs no GPU time."""

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from .events import Event
from .stream import Sink

MAX_QUEUED_EVENTS = 1000
"""Most events that wait for a slow sink; further ones are only in metrics.jsonl."""
CLOSE_TIMEOUT_SECONDS = 60.0
"""Time that the end of a run waits for a sink to finish."""


class BackgroundSink:
    """Wrapper that opens a sink and feeds it events in a thread; `emit` never waits.

    If the sink fails, the next `emit` raises its error, so that the stream drops it. If it was too slow for all events,
    or does not finish, `close` raises.
    """

    def __init__(
        self,
        open_sink: Callable[[], Sink],
        *,
        name: str,
        max_queued_events: int = MAX_QUEUED_EVENTS,
        close_timeout_seconds: float = CLOSE_TIMEOUT_SECONDS,
    ) -> None:
        self.name = name
        self._events: queue.Queue[Event | None] = queue.Queue(max_queued_events)
        self._close_seconds = close_timeout_seconds
        self._error: Exception | None = None
        self._dropped = 0
        # A daemon: a server that never answers must not keep the process, and its GPU, either.
        self._thread = threading.Thread(target=self._run, args=(open_sink,), name=name, daemon=True)
        self._thread.start()

    def _run(self, open_sink: Callable[[], Sink]) -> None:
        try:
            sink = open_sink()
            while (event := self._events.get()) is not None:
                sink.emit(event)
            sink.close()
        except Exception as error:
            self._error = error

    def emit(self, event: Event) -> None:
        """Queue `event`, or drop it if too many wait."""
        if self._error is not None:
            raise self._error
        try:
            self._events.put_nowait(event)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Wait a limited time for the sink to finish. Raises its error, or `TimeoutError` for events that it missed."""
        deadline = time.monotonic() + self._close_seconds
        with suppress(queue.Full):
            self._events.put(None, timeout=self._close_seconds if self._error is None else 0)
            self._thread.join(deadline - time.monotonic())
        if self._error is not None:
            raise self._error
        if self._thread.is_alive():
            raise TimeoutError(
                f"{self.name} has not finished after {self._close_seconds:g} s; its missing events are in metrics.jsonl"
            )
        if self._dropped:
            raise TimeoutError(
                f"{self.name} was too slow: {self._dropped} events were dropped; they are in metrics.jsonl"
            )
