"""Reading of a `metrics.jsonl` of any size: rare events in full, steps downsampled.

A run of a million steps has two gigabytes of events, which take minutes and nine gigabytes of memory to parse.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...comm.files.file_io import config_error_context, open_regular_file, read_bounded_lines
from ...comm.files.line_reader import LineReader
from .events import Event, RunResumed, parse_event
from .history import MetricsHistory

MAX_STEPS_KEPT, MAX_BYTES_KEPT = 4096, 64 * 2**20
"""Most step lines, and their bytes, that are kept: more than any plot has columns."""
MAX_OTHER_EVENTS = 20_000
"""Most lines of each other kind that are kept."""
TAIL_BYTES = 16 * 2**20
_STEP = re.compile(rb'\{"time": [0-9.e+]+, "kind": "step", "step": ([0-9]+), "loss": ([-+.0-9eE]+)')
_HEAD_BYTES = 200


@dataclass(frozen=True)
class _Line:
    number: int
    step: int
    loss: float
    raw: bytes


class StepDownsampler:
    """Downsampler of step lines: of each group of consecutive steps it keeps those with the lowest and highest loss.

    When there are too many groups, each two are merged.
    """

    def __init__(self, most_steps: int = MAX_STEPS_KEPT, most_bytes: int = MAX_BYTES_KEPT) -> None:
        self._most_steps, self._most_bytes = most_steps, most_bytes
        self._groups: list[list[_Line]] = []
        self._length = 1
        """Lines per group."""
        self._in_last = 0
        self._bytes = 0

    def add_line(self, line: _Line) -> None:
        """Add the next line."""
        if not self._groups or self._in_last >= self._length:
            self._groups.append([])
            self._in_last = 0
        self._in_last += 1
        self._bytes += len(line.raw)
        last = self._groups[-1]
        last.append(line)
        if len(last) > 2:
            self._groups[-1] = self._ends(last)
        if 2 * len(self._groups) > self._most_steps or self._bytes > self._most_bytes:
            self._halve()

    def roll_back_to(self, step: int) -> None:
        """Drop the steps after `step`."""
        kept = [[line for line in group if line.step <= step] for group in self._groups]
        self._groups = [group for group in kept if group]
        self._bytes = sum(len(line.raw) for line in self.kept_lines())

    def kept_lines(self) -> Iterator[_Line]:
        """Yield the kept lines in order."""
        for group in self._groups:
            yield from group

    def _ends(self, lines: list[_Line]) -> list[_Line]:
        lowest, highest = (choose(lines, key=lambda line: line.loss) for choose in (min, max))
        kept = sorted({lowest.number: lowest, highest.number: highest}.values(), key=lambda line: line.number)
        self._bytes -= sum(len(line.raw) for line in lines) - sum(len(line.raw) for line in kept)
        return kept

    def _halve(self) -> None:
        pairs = zip(self._groups[::2], [*self._groups[1::2], []], strict=False)
        self._groups = [self._ends([*one, *two]) for one, two in pairs]
        self._length *= 2
        self._in_last = self._length


def read_downsampled_metrics(path: Path) -> list[Event]:
    """Return the retained history of the run whose metrics are at `path`; of a short run the same as `read_metrics`.

    More than `MAX_STEPS_KEPT` steps are downsampled, with the extremes of the loss kept; of each other kind the last
    `MAX_OTHER_EVENTS` events are kept. Raises `ConfigError` for a broken line among those that are parsed.
    """
    steps, others = StepDownsampler(), dict[type[Event], list[tuple[int, Event]]]()
    for number, raw in _raw_lines(path):
        found = _STEP.match(raw, 0, _HEAD_BYTES)
        if found is not None and _is_number(found[2]):
            steps.add_line(_Line(number, int(found[1]), float(found[2]), raw))
            continue
        event = parse_event(path, number, raw.decode(errors="surrogateescape"))
        if isinstance(event, RunResumed):
            steps.roll_back_to(event.step)
        kept = others.setdefault(type(event), [])
        kept.append((number, event))
        if len(kept) > 2 * MAX_OTHER_EVENTS:
            del kept[:-MAX_OTHER_EVENTS]
    retained = [
        (line.number, parse_event(path, line.number, line.raw.decode(errors="surrogateescape")))
        for line in steps.kept_lines()
    ]
    retained += [each for kept in others.values() for each in kept]
    return MetricsHistory(event for _, event in sorted(retained, key=lambda each: each[0])).events


def _is_number(text: bytes) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield whole lines with their numbers, without newlines."""
    with config_error_context(path, "restore it"), open_regular_file(path) as file:
        for number, line in enumerate(read_bounded_lines(file), 1):
            if not line.endswith(b"\n"):
                return
            yield number, line[:-1]


def open_tail_reader(path: Path, tail_bytes: int = TAIL_BYTES) -> LineReader:
    """Return a reader of `path` that begins at the first line of its last `tail_bytes`."""
    try:
        size = path.stat().st_size
        if size <= tail_bytes:
            return LineReader(path)
        with path.open("rb") as file:
            file.seek(size - tail_bytes)
            while skipped := file.readline(2**20):
                if skipped.endswith(b"\n"):
                    return LineReader(path, file.tell())
    except OSError:
        pass
    return LineReader(path)
