"""Reading `metrics.jsonl` back as the history that the weights have lived through."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ...comm.errors import ConfigError, Problem
from ...comm.files.file_io import config_error_context
from ...comm.files.line_reader import LineReader, read_complete_lines
from ...comm.files.strict_json import MalformedFileError, parse_json
from .events import Event

_MEASURED = frozenset({"step", "evaluation", "sample", "checkpoint", "memory"})


class MetricsHistory:
    """The events that still hold, of those heard so far.

    After a resume from step r, what an earlier life measured after r never happened to these weights and is dropped; of
    two measurements of one kind at one step the later counts. Events about the run itself (run, resume, stop, budget,
    warning) are all kept.
    """

    def __init__(self, events: Iterable[Event] = (), most: int | None = None) -> None:
        """Of more than `most` events the first ones are forgotten."""
        self._most = most
        self._kept: list[Event] = []
        self.add_events(events)

    def add_events(self, events: Iterable[Event]) -> None:
        """What has happened next."""
        for event in events:
            if event.kind == "resume":
                self._kept = [old for old in self._kept if old.kind not in _MEASURED or old.step <= event.step]
            self._kept.append(event)
            if self._most is not None and len(self._kept) > 2 * self._most:
                del self._kept[: -self._most]

    @property
    def events(self) -> list[Event]:
        """In order."""
        last = {(event.kind, event.step): index for index, event in enumerate(self._kept)}
        return [
            event
            for index, event in enumerate(self._kept)
            if event.kind not in _MEASURED or last[(event.kind, event.step)] == index
        ]


def read_metrics(path: Path) -> list[Event]:
    """The retained history of the run whose `metrics.jsonl` is at `path`, in order (see `MetricsHistory`).

    A last line still being written is left out. Raises `ConfigError` for a missing file or a broken line.
    """
    return MetricsHistory(read_all_metrics(path)).events


def read_all_metrics(path: Path) -> list[Event]:
    """Every event in the file at `path`, rolled back ones included. Raises `ConfigError` like `read_metrics`."""
    if not path.exists():
        raise ConfigError([Problem(str(path), None, "no such file; name the metrics.jsonl of a run")])
    with config_error_context(path, "restore it"):
        return [parse_event(path, number, line) for number, line in read_complete_lines(path)]


class MetricsReader:
    """Reads a `metrics.jsonl` while it grows."""

    def __init__(self, path: Path, lines: LineReader | None = None) -> None:
        """`lines` may begin in the middle of the file; by default they begin at its start."""
        self._path = path
        self._lines = LineReader(path) if lines is None else lines

    def new_events(self) -> list[Event]:
        """What has been appended since the last call. Raises `ConfigError` for a broken line.

        Raises FileNotFoundError while there is no file, and `lines.Replaced` when it is not the one of the last call.
        """
        try:
            return [parse_event(self._path, number, line) for number, line in self._lines.read_new_lines()]
        except MalformedFileError as error:
            raise ConfigError([error.to_problem(self._path, "restore it")]) from error


_LAST_SECOND = 10**11
"""Since the epoch: the year 5138, which every calendar still writes."""
_LAST_STEP = 2**53


def parse_event(path: Path, number: int, line: str) -> Event:
    """The event on line `number` of the file at `path`. Raises `ConfigError` for a broken line."""
    try:
        item = parse_json(line if line.isascii() else line.encode(errors="surrogateescape"))
        kind, step, time = (
            item["kind"].as_string(),
            item["step"].as_integer(0, _LAST_STEP),
            item["time"].as_number(0, _LAST_SECOND),
        )
        values = {key: value for key, value in item.as_mapping().items() if key not in ("kind", "step", "time")}
        return Event(kind=kind, step=step, time=time, values=values)
    except MalformedFileError as error:
        hint = f"not an event ({error}); restore or delete this line"
        raise ConfigError([Problem(f"{path}:{number}", line[:80], hint)]) from error
