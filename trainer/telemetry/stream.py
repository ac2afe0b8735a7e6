"""Event stream of a run: everything that is plotted or printed is one event in one file.

`metrics.jsonl` is the record; the terminal and wandb are views of it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ...comm.errors import ConfigError
from ...comm.files.file_io import raise_if_not_regular_file
from ...comm.files.line_reader import truncate_partial_line
from ...comm.files.line_writer import MAX_BACKLOG_BYTES, LineWriter
from .events import METRICS_FILE, Event, WarningRaised


class Sink(Protocol):
    """Consumer of the stream. It gets every event in order, then is closed."""

    @property
    def name(self) -> str:
        """Name in messages."""
        ...

    def emit(self, event: Event) -> None:
        """Show `event`."""

    def close(self) -> None:
        """Finish; no event follows."""


class EventStream:
    """Writer of `run_dir/metrics.jsonl` that passes each event on to the sinks; only rank 0 has one.

    A sink that raises is dropped, with a `warning` event; the run continues. Events that a full disk does not take wait
    in memory (see `LineWriter`).
    """

    def __init__(self, run_dir: Path, sinks: Sequence[Sink], *, backlog_bytes: int = MAX_BACKLOG_BYTES) -> None:
        """Open or create the file. Raises `OSError`."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / METRICS_FILE
        raise_if_not_regular_file(self._path)
        truncate_partial_line(self._path)
        self._backlog_bytes = backlog_bytes
        self._writer = LineWriter(self._path, max_backlog_bytes=backlog_bytes)
        self._dropped = 0
        self._sinks = list(sinks)

    @property
    def pending_events(self) -> int:
        """Number of events that are not in the file yet."""
        return self._writer.pending_lines

    @property
    def write_error(self) -> str | None:
        """Reason why events are not in the file; None if all are."""
        return self._writer.write_error

    def emit(self, event: Event) -> None:
        """Write `event`, then pass it to the sinks."""
        self._record(event)
        for sink in tuple(self._sinks):
            try:
                sink.emit(event)
            except Exception as error:
                self._sinks.remove(sink)
                self.emit(_lost(sink, event.step, error))

    def close(self) -> None:
        """Close the sinks, then the file."""
        while self._sinks:
            sink = self._sinks.pop()
            try:
                sink.close()
            except Exception as error:
                self.emit(_lost(sink, 0, error))
        self._writer.close()

    def _record(self, event: Event) -> None:
        if self._writer.is_deleted:
            self._reopen(event.step)
        if self._dropped and self._writer.flush():
            text, self._dropped = f"{self._dropped} events were dropped here: the disk was full", 0
            self._append(WarningRaised(step=event.step, about="disk", message=text))
        self._append(event)

    def _append(self, event: Event) -> None:
        if not self._writer.append((event.to_json_line() + "\n").encode()):
            self._dropped += 1

    def _reopen(self, step: int) -> None:
        """Start a new file after the current one was deleted."""
        try:
            raise_if_not_regular_file(self._path)
            writer = LineWriter(self._path, max_backlog_bytes=self._backlog_bytes)
        except (OSError, ConfigError):
            return  # the whole directory is gone (see `Reporter`), or the path is a link now
        self._writer.close()
        self._writer = writer
        text = f"{METRICS_FILE} was deleted; a new one was started"
        self._append(WarningRaised(step=step, about="disk", message=text))


def _lost(sink: Sink, step: int, error: Exception) -> Event:
    return WarningRaised(step=step, message=f"{sink.name} failed and was dropped: {error!r}")
