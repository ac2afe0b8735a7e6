"""A view of the stream in a thread of its own: what a server takes to answer is nobody's GPU time."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from .events import Event, Sink

MAX_QUEUED_EVENTS = 1000
"""More than these are not kept for a view that is slow: they are in metrics.jsonl."""
CLOSE_TIMEOUT_SECONDS = 60.0
"""How long the end of a run waits for a view to finish."""


class BackgroundSink:
    """Opens a sink in a thread and hands it the events from there; `emit` never waits.

    A sink that fails makes the next `emit` raise what it failed with, so that the stream drops it; one that was too
    slow to hear everything, or to finish, makes `close` raise.
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
        self._left_out = 0
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
        """Hand over `event`, or leave it out where too many wait."""
        if self._error is not None:
            raise self._error
        try:
            self._events.put_nowait(event)
        except queue.Full:
            self._left_out += 1

    def close(self) -> None:
        """Let the sink finish, for a limited time. Raises what kept it from hearing everything."""
        deadline = time.monotonic() + self._close_seconds
        with suppress(queue.Full):
            self._events.put(None, timeout=self._close_seconds if self._error is None else 0)
            self._thread.join(deadline - time.monotonic())
        if self._error is not None:
            raise self._error
        if self._thread.is_alive():
            raise TimeoutError(
                f"{self.name} is not done after {self._close_seconds:g} s; what it lacks is in metrics.jsonl"
            )
        if self._left_out:
            raise TimeoutError(
                f"{self.name} was too slow: {self._left_out} events were left out; they are in metrics.jsonl"
            )
