"""Event stream of a run: everything that is plotted or printed is one event in one file.

`metrics.jsonl` is the record; the terminal and wandb are views of it. Values are flat: `loss/mtp` is one key.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

from ...comm.errors import ConfigError
from ...comm.files.file_io import raise_if_not_regular_file
from ...comm.files.line_reader import truncate_partial_line
from ...comm.files.line_writer import MAX_BACKLOG_BYTES, LineWriter

JSON: TypeAlias = bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"] | None

METRICS_FILE = "metrics.jsonl"
METRICS_FORMAT = 2
"""Number in each `run` event; without it, the format is 1, whose keys had other names."""
_RESERVED_KEYS = ("time", "kind", "step")
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


@dataclass(frozen=True)
class Event:
    """One event.

    Kinds of the training loop: `run` (format, version, configuration and model size), `start` (checkpoint of the
    initial weights), `resume` (step of the checkpoint), `step`, `evaluation`, `sample` (generated text), `checkpoint`,
    `memory` (of every rank, at a sampled step), `trace` (timeline written), `budget` (final summary), `stop`, and
    `warning`.
    """

    kind: str
    step: int
    """Optimizer steps done when it happened."""
    values: Mapping[str, JSON]
    """Flat keys with slashes; plain Python values, no tensors."""
    time: float = field(default_factory=time.time)
    """Seconds since the epoch."""

    def to_json_line(self) -> str:
        """Return one JSON line without newline. Raises `ValueError` for a value named time, kind or step."""
        taken = [key for key in _RESERVED_KEYS if key in self.values]
        if taken:
            raise ValueError(f"the values of a {self.kind} event may not be named {', '.join(taken)}")
        head = {"time": round(self.time, 3), "kind": self.kind, "step": self.step}
        return json.dumps({**head, **{key: _strict(value) for key, value in self.values.items()}}, allow_nan=False)


def _strict(value: JSON) -> JSON:
    """Return `value` with NaN and infinities as strings."""
    # JSON has no NaN; strings, as in protobuf's JSON mapping, keep the file readable for every parser.
    if isinstance(value, float) and not math.isfinite(value):
        return _NOT_FINITE[0 if math.isnan(value) else 1 if value > 0 else 2]
    if isinstance(value, Mapping):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_strict(inner) for inner in value]
    return value


def parse_number(value: JSON) -> float | None:
    """Return `value` as a number, also from the string of NaN or an infinity; None for anything else."""
    if isinstance(value, str):
        return float(value) if value in _NOT_FINITE else None
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    except OverflowError:  # an integer beyond the range of a float
        return None


def numbers_in_list(value: JSON) -> list[float]:
    """Return the numbers in the list `value`; empty if it is no list."""
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    return [number for item in items if (number := parse_number(item)) is not None]


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
            self._append(Event("warning", event.step, {"about": "disk", "message": text}))
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
        self._append(
            Event("warning", step, {"about": "disk", "message": f"{METRICS_FILE} was deleted; a new one was started"})
        )


def _lost(sink: Sink, step: int, error: Exception) -> Event:
    return Event("warning", step, {"message": f"{sink.name} failed and was dropped: {error!r}"})
