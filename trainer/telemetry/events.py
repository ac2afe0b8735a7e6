"""The event stream of a run: everything worth a plot or a line happens as one event, in one file.

`metrics.jsonl` is the record; the terminal and wandb are views of it. Values are flat: `loss/mtp` is one key.
"""

from __future__ import annotations

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
_OWN_KEYS = ("time", "kind", "step")
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Kinds of the training loop: `run` (configuration and facts of the model), `start` (the checkpoint whose weights it
    begins with), `resume` (the step it resumes from), `step`, `evaluation`, `sample` (generated text), `checkpoint`,
    `memory` (of every rank, at a step that is looked at closely), `trace` (a timeline is written),
    `budget` (final summary), `stop`, and `warning`.
    """

    kind: str
    step: int
    """Optimizer steps done when it happened."""
    values: Mapping[str, JSON]
    """Flat keys with slashes; plain Python values, no tensors."""
    time: float = field(default_factory=time.time)
    """Seconds since the epoch."""

    def to_json_line(self) -> str:
        """Its line of `metrics.jsonl`, without newline. Raises ValueError for a value named time, kind or step."""
        taken = [key for key in _OWN_KEYS if key in self.values]
        if taken:
            raise ValueError(f"the values of a {self.kind} event may not be named {', '.join(taken)}")
        own = {"time": round(self.time, 3), "kind": self.kind, "step": self.step}
        return json.dumps({**own, **{key: _strict(value) for key, value in self.values.items()}}, allow_nan=False)


def _strict(value: JSON) -> JSON:
    """JSON has no NaN; like protobuf's JSON mapping, write it as a string, so that every parser can read the file."""
    if isinstance(value, float) and not math.isfinite(value):
        return _NOT_FINITE[0 if math.isnan(value) else 1 if value > 0 else 2]
    if isinstance(value, Mapping):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_strict(inner) for inner in value]
    return value


def parse_number(value: JSON) -> float | None:
    """`value` as a number, also where it was read back and is the word for one that is not finite; else None."""
    if isinstance(value, str):
        return float(value) if value in _NOT_FINITE else None
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    except OverflowError:  # a whole number of more digits than a float has room for
        return None


def parse_numbers(value: JSON) -> list[float]:
    """The numbers of the list `value`; none where it is no list."""
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    return [number for item in items if (number := parse_number(item)) is not None]


class Sink(Protocol):
    """A view of the stream. It sees every event in order, then is closed."""

    @property
    def name(self) -> str:
        """What its user calls it."""
        ...

    def emit(self, event: Event) -> None:
        """Show `event`."""

    def close(self) -> None:
        """Finish; no event follows."""


class EventStream:
    """Appends each event to `run_dir/metrics.jsonl`, then hands it to the sinks. One writer a run: rank 0.

    A sink that raises is dropped and the loss is recorded as a `warning` event: a view may break, but the run is paid
    by the GPU-hour and goes on. Events that a full disk does not take wait in memory (see `LineWriter`).
    """

    def __init__(self, run_dir: Path, sinks: Sequence[Sink], *, backlog_bytes: int = MAX_BACKLOG_BYTES) -> None:
        """Raises `OSError` where the file can be neither opened nor made."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / METRICS_FILE
        raise_if_not_regular_file(self._path)
        truncate_partial_line(self._path)
        self._backlog_bytes = backlog_bytes
        self._writer = LineWriter(self._path, max_backlog_bytes=backlog_bytes)
        self._left_out = 0
        self._sinks = list(sinks)

    @property
    def pending_events(self) -> int:
        """Events that are not in the file yet."""
        return self._writer.pending_lines

    @property
    def write_error(self) -> str | None:
        """Why events wait; None where none does."""
        return self._writer.write_error

    def emit(self, event: Event) -> None:
        """Record `event`, then show it."""
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
        if self._left_out and self._writer.flush():
            text, self._left_out = f"{self._left_out} events were left out here: the disk was full", 0
            self._append(Event("warning", event.step, {"about": "disk", "message": text}))
        self._append(event)

    def _append(self, event: Event) -> None:
        if not self._writer.append((event.to_json_line() + "\n").encode()):
            self._left_out += 1

    def _reopen(self, step: int) -> None:
        """Begin a new file where a person has removed the one that was written so far."""
        try:
            raise_if_not_regular_file(self._path)
            writer = LineWriter(self._path, max_backlog_bytes=self._backlog_bytes)
        except (OSError, ConfigError):
            return  # the whole directory is gone: see `Reporter`; or a link stands there
        self._writer.close()
        self._writer = writer
        self._append(
            Event("warning", step, {"about": "disk", "message": f"{METRICS_FILE} was removed; it begins anew"})
        )


def _lost(sink: Sink, step: int, error: Exception) -> Event:
    return Event("warning", step, {"message": f"{sink.name} failed and is dropped: {error!r}"})
