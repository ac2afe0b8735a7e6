"""Reading of `metrics.jsonl` as the history of the current weights, without rolled back steps."""

from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from ...comm.errors import ConfigError, Problem
from ...comm.files.file_io import config_error_context
from ...comm.files.line_reader import LineReader, read_complete_lines
from ...comm.files.strict_json import MalformedFileError
from .events import (
    METRICS_FILE,
    CheckpointSaved,
    Event,
    LossEvaluated,
    MemoryMeasured,
    RunResumed,
    RunStarted,
    StepLogged,
    TextSampled,
    parse_event,
    parse_number,
)

_MEASUREMENTS = (StepLogged, LossEvaluated, TextSampled, CheckpointSaved, MemoryMeasured)


class MetricsHistory:
    """Retained events.

    After a resume from step r, earlier measurements after r are dropped; of two measurements of one kind at one step
    the later counts. Events about the run itself (run, resume, stop, budget, warning) are all kept.
    """

    def __init__(self, events: Iterable[Event] = (), most: int | None = None) -> None:
        """Keep at least the last `most` events, or all if it is None."""
        self._most = most
        self._kept: list[Event] = []
        self.add_events(events)

    def add_events(self, events: Iterable[Event]) -> None:
        """Add the next events."""
        for event in events:
            if isinstance(event, RunResumed):
                self._kept = [old for old in self._kept if not isinstance(old, _MEASUREMENTS) or old.step <= event.step]
            self._kept.append(event)
            if self._most is not None and len(self._kept) > 2 * self._most:
                del self._kept[: -self._most]

    @property
    def events(self) -> list[Event]:
        """Retained events in order."""
        last = {(type(event), event.step): index for index, event in enumerate(self._kept)}
        return [
            event
            for index, event in enumerate(self._kept)
            if not isinstance(event, _MEASUREMENTS) or last[(type(event), event.step)] == index
        ]


def read_metrics(path: Path) -> list[Event]:
    """Return the retained events of the `metrics.jsonl` at `path`, in order (see `MetricsHistory`).

    Ignores a last line still being written. Raises `ConfigError` for a missing file, a broken line or another format.
    """
    return MetricsHistory(read_all_metrics(path)).events


def metrics_table(run: Path, kind: str) -> dict[str, list[Any]]:
    """Return the retained events of `kind` as columns, None where an event lacks a value.

    `run` is the directory of a run or its `metrics.jsonl`. The first columns are `step` and `time`, in seconds since
    the epoch. Raises `ConfigError` like `read_metrics`.
    """
    path = run / METRICS_FILE if run.is_dir() else run
    events = [event for event in read_metrics(path) if event.kind == kind]
    table: dict[str, list[Any]] = {"step": [event.step for event in events], "time": [event.time for event in events]}
    rows = [event.values for event in events]
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(key) for row in rows]
        # Metrics hold NaN and infinities as strings, as the file does.
        table[key] = [parse_number(value) or value if isinstance(value, str) else value for value in values]
    return table


def read_all_metrics(path: Path) -> list[Event]:
    """Return every event of the file, including rolled back ones. Raises `ConfigError` like `read_metrics`."""
    if not path.exists():
        raise ConfigError([Problem(str(path), None, "no such file; name the metrics.jsonl of a run")])
    with config_error_context(path, "restore it"):
        return [parse_event(path, number, line) for number, line in read_complete_lines(path)]


_HEAD_LINES = 100
"""Lines searched for the first `run` event. It is the first line, unless the file was deleted during the run."""


def check_metrics_format(path: Path) -> None:
    """Raise `UnsupportedFormatConfigError` if the first `run` event at `path` has another format than `METRICS_FORMAT`.

    A file without a `run` event is accepted, and so is a missing file. For readers that begin in the middle.
    """
    with config_error_context(path, "restore it"), suppress(FileNotFoundError):
        for number, line in islice(read_complete_lines(path), _HEAD_LINES):
            if isinstance(parse_event(path, number, line), RunStarted):
                return


class MetricsReader:
    """Incremental reader of a growing `metrics.jsonl`."""

    def __init__(self, path: Path, lines: LineReader | None = None) -> None:
        """`lines` may begin in the middle of the file; by default they begin at its start."""
        self._path = path
        self._lines = LineReader(path) if lines is None else lines

    def new_events(self) -> list[Event]:
        """Return the events appended since the last call. Raises `ConfigError` for a broken line.

        Raises `FileNotFoundError` while there is no file, and `FileReplacedError` if it was replaced.
        """
        try:
            return [parse_event(self._path, number, line) for number, line in self._lines.read_new_lines()]
        except MalformedFileError as error:
            raise ConfigError([error.to_problem(self._path, "restore it")]) from error
