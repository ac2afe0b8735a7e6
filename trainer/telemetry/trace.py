"""Timelines of traced steps, one file per rank, in the JSON of Perfetto and Chrome; and their sums by term."""

import json
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

from ...comm.files.file_io import read_json, replace_file_atomically
from ...comm.files.strict_json import JsonValue, MalformedFileError
from ...comm.trace import EXPOSED_ALL_TO_ALL, GRADIENT_SYNC_WAIT, NULL_RECORDER, OPTIMIZER, PIPELINE_WAIT, TimelineTrack
from ..ledger.terms import INSTRUCTIONS, to_paper_terms

TRACE_FILE = "trace.json"
_RANK_FILE = "rank_{:05d}.json"
_TRACKS = tuple(TimelineTrack)
_MOST_RANKS = 10**7
_LATEST_US = 1e17
"""Largest time in microseconds since the epoch."""


@dataclass(frozen=True)
class Span:
    """Recorded interval, in nanoseconds of this machine's monotonic clock; an instant has length 0."""

    track: TimelineTrack
    name: str
    detail: str
    begin: int
    end: int


class TraceRecorder:
    """Recorder of spans while `is_recording`. On a GPU spans are host times, also marked by NVTX ranges."""

    def __init__(self, *, nvtx: bool) -> None:
        self.spans: list[Span] = []
        self.is_recording = False
        self._nvtx = nvtx

    def span(self, track: TimelineTrack, name: str, detail: object = None) -> AbstractContextManager[object]:
        """See `SpanRecorder`."""
        return self._keep(track, name, detail) if self.is_recording else NULL_RECORDER.span(track, name)

    def record_instant(self, track: TimelineTrack, name: str, detail: object = None) -> None:
        """See `SpanRecorder`."""
        if self.is_recording:
            now = time.perf_counter_ns()
            self.spans.append(Span(track, name, str(detail or ""), now, now))

    @contextmanager
    def _keep(self, track: TimelineTrack, name: str, detail: object) -> Iterator[None]:
        begin = time.perf_counter_ns()
        if self._nvtx:
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if self._nvtx:
                torch.cuda.nvtx.range_pop()
            self.spans.append(Span(track, name, str(detail or ""), begin, time.perf_counter_ns()))


def write_rank_trace(folder: Path, rank: int, spans: Sequence[Span]) -> None:
    """Write the file of one rank."""
    # On the wall clock, so that the files of several nodes can be merged.
    folder.mkdir(parents=True, exist_ok=True)
    shift = time.time_ns() - time.perf_counter_ns()
    (folder / _RANK_FILE.format(rank)).write_text(
        json.dumps({"traceEvents": list(to_chrome_trace_events(rank, spans, shift))})
    )


def merge_rank_traces(folder: Path, ranks: int) -> Path:
    """Merge the files of all ranks into one, with a group of tracks per rank; return its path."""
    events = []
    for rank in range(ranks):
        events += read_json(folder / _RANK_FILE.format(rank))["traceEvents"].value
    start = min((event["ts"] for event in events if "ts" in event), default=0)
    for event in events:
        if "ts" in event:
            event["ts"] -= start
    path = folder / TRACE_FILE
    replace_file_atomically(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode())
    return path


def read_trace(path: Path) -> dict[int, list[Span]]:
    """Return the spans of each rank in a merged file. Raises `OSError`, and `ValueError` for any other file."""
    try:
        ranks: dict[int, list[Span]] = {}
        for event in read_json(path)["traceEvents"].as_list():
            spans = ranks.setdefault(event["pid"].as_integer(0, _MOST_RANKS), [])
            if event["ph"].as_string() != "M":
                spans.append(_read_span(event))
    except MalformedFileError as error:
        raise ValueError(f"is no timeline of a traced run ({error})") from error
    return ranks


def _read_span(event: JsonValue) -> Span:
    track = _TRACKS[event["tid"].as_integer(0, len(_TRACKS) - 1)]
    length = event["dur"].as_number(0, _LATEST_US) if "dur" in event else 0.0
    begin = round(1e3 * event["ts"].as_number(0, _LATEST_US))
    return Span(track, event["name"].as_string(), event["args"]["of"].as_string(), begin, begin + round(1e3 * length))


def to_chrome_trace_events(rank: int, spans: Sequence[Span], shift: int = 0) -> Iterator[dict[str, object]]:
    """Yield one rank's spans as events of Chrome's trace format; `shift` nanoseconds are added to their times."""
    yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
    tracks = list(TimelineTrack)
    for number, track in enumerate(tracks):
        yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": number, "args": {"name": track.value}}
    for span in sorted(spans, key=lambda span: (span.begin, -span.end)):
        event: dict[str, object] = {"name": span.name, "args": {"of": span.detail}, "pid": rank}
        event |= {"tid": tracks.index(span.track), "ts": (span.begin + shift) / 1e3}
        if span.track is TimelineTrack.LAUNCH:
            yield event | {"ph": "i", "s": "t"}
        else:
            yield event | {"ph": "X", "dur": (span.end - span.begin) / 1e3}


def summarize_trace(spans: Sequence[Span]) -> dict[str, float]:
    """Return the seconds of one rank by productive term, and by the terms of `to_paper_terms`.

    Terms are disjoint: instructions exclude the all-to-alls that they wait for. One rank cannot tell which pipeline
    waits are bubble.
    """
    by_name: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        by_name[span.name].append(span)
    waits = _Waits.of(by_name[EXPOSED_ALL_TO_ALL])
    terms: dict[str, float] = {}
    for name in INSTRUCTIONS:
        op_spans = [span for span in by_name[name] if span.track is TimelineTrack.INSTRUCTION]
        terms[name] = sum(span.end - span.begin - waits.inside(span) for span in op_spans) / 1e9
    for name in (EXPOSED_ALL_TO_ALL, PIPELINE_WAIT, GRADIENT_SYNC_WAIT, OPTIMIZER):
        terms[name] = sum(span.end - span.begin for span in by_name[name]) / 1e9
    return terms | to_paper_terms(terms, None)


@dataclass(frozen=True)
class _Waits:
    """Disjoint waiting spans, each inside at most one instruction; a step of a deep pipeline has thousands."""

    begins: list[int]
    sums: list[int]
    """Prefix sums of the spans' lengths."""

    @staticmethod
    def of(spans: Sequence[Span]) -> "_Waits":
        ordered = sorted(spans, key=lambda span: span.begin)
        lengths = (span.end - span.begin for span in ordered)
        return _Waits([span.begin for span in ordered], [0, *accumulate(lengths)])

    def inside(self, span: Span) -> int:
        """Return the nanoseconds of waiting in `span`."""
        first, after = bisect_left(self.begins, span.begin), bisect_left(self.begins, span.end)
        return self.sums[after] - self.sums[first]


def trace_metrics(summaries: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Return the metrics of a `TraceWritten`: each term's seconds by rank."""
    names = list(summaries[0])
    return {f"trace/{name}": [summary[name] for summary in summaries] for name in names}
