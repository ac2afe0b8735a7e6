"""Timelines: the spans kept, their sums, and a file that Perfetto can open."""

import json
from pathlib import Path

import pytest

from shoestring.comm.trace import (
    EXPOSED_ALL_TO_ALL,
    GRADIENT_SYNC_WAIT,
    NULL_RECORDER,
    OPTIMIZER,
    PIPELINE_WAIT,
    TimelineTrack,
)
from shoestring.trainer.telemetry.trace import Span, TraceRecorder, merge_rank_traces, summarize_trace, write_rank_trace

SPANS = [
    Span(TimelineTrack.INSTRUCTION, PIPELINE_WAIT, "", 0, 50),
    Span(TimelineTrack.INSTRUCTION, "F", "F chunk 0 micro-batch 0", 50, 150),
    Span(TimelineTrack.COMPUTE, EXPOSED_ALL_TO_ALL, "layer_01", 60, 90),
    Span(TimelineTrack.INSTRUCTION, "FB", "", 150, 400),
    Span(TimelineTrack.COMPUTE, EXPOSED_ALL_TO_ALL, "layer_02", 200, 210),
    Span(TimelineTrack.INSTRUCTION, "I", "", 400, 420),
    Span(TimelineTrack.INSTRUCTION, "W", "", 420, 425),
    Span(TimelineTrack.INSTRUCTION, "B", "", 425, 500),
    Span(TimelineTrack.INSTRUCTION, GRADIENT_SYNC_WAIT, "", 500, 510),
    Span(TimelineTrack.INSTRUCTION, OPTIMIZER, "", 510, 530),
    Span(TimelineTrack.LAUNCH, "dispatch of layer_01", "", 55, 55),
    Span(TimelineTrack.EXCHANGE, "dispatch of layer_01", "", 55, 88),
]


def test_terms_are_disjoint_and_add_up_to_the_step() -> None:
    terms = {name: round(seconds * 1e9) for name, seconds in summarize_trace(SPANS).items()}
    wanted = {"F": 70, "FB": 240, "I": 20, "W": 5, "B": 75, EXPOSED_ALL_TO_ALL: 40, PIPELINE_WAIT: 50}
    wanted |= {GRADIENT_SYNC_WAIT: 10, OPTIMIZER: 20}
    assert {name: terms[name] for name in wanted} == wanted
    assert sum(wanted.values()) == 530
    view = {"1F": 70, "1B": 95, "1W": 5, "1F1B": 240, "opt": 20}
    assert {name: terms[name] for name in view} == view
    assert not {"bubble", "imbalance"} & set(terms)  # one rank does not know the program's ideal bubble


def test_nothing_is_kept_while_it_is_off() -> None:
    trace = TraceRecorder(nvtx=False)
    assert trace.span(TimelineTrack.COMPUTE, "attn(F)") is NULL_RECORDER.span(
        TimelineTrack.COMPUTE, "attn(F)"
    )  # not even a new object
    with trace.span(TimelineTrack.COMPUTE, "attn(F)"):
        trace.record_instant(TimelineTrack.LAUNCH, "dispatch")
    assert not trace.spans
    trace.is_recording = True
    with pytest.raises(KeyError), trace.span(TimelineTrack.COMPUTE, "attn(F)", 3):
        raise KeyError
    trace.record_instant(TimelineTrack.LAUNCH, "dispatch")
    assert [(span.name, span.detail) for span in trace.spans] == [("attn(F)", "3"), ("dispatch", "")]


def test_ranks_are_merged_into_one_file(tmp_path: Path) -> None:
    for rank in range(2):
        write_rank_trace(tmp_path, rank, SPANS)
    events = json.loads(merge_rank_traces(tmp_path, 2).read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {"rank 0", "rank 1", *(track.value for track in TimelineTrack)}
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == 2 * 11
    assert min(event["ts"] for event in spans) == pytest.approx(0, abs=1)
    assert all(event["dur"] > 0 for event in spans)
    assert len([event for event in events if event["ph"] == "i"]) == 2
