"""Events of each kind as lines of flat, strict JSON, and read back."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.tests.trainer.telemetry.written_events import EVALUATION, RUN, STEP, step, write
from shoestring.trainer.telemetry.events import (
    EVENT_KINDS,
    BudgetReported,
    CheckpointSaved,
    Event,
    InitialWeightsLoaded,
    MemoryMeasured,
    RunResumed,
    RunStopped,
    StepLogged,
    TextSampled,
    TraceWritten,
    WarningRaised,
    parse_event,
)
from shoestring.trainer.telemetry.history import read_metrics


def test_values_that_are_not_finite_stay_readable_by_any_parser(tmp_path: Path) -> None:
    more = {"load/layer_01/max_violation": math.nan, "more": [math.inf, {"deep": -math.inf}]}
    path = write(tmp_path, step(1, math.nan, mtp_loss=math.inf, grad_norm=-math.inf, metrics=more))
    line = json.loads(path.read_text())
    assert (line["loss"], line["loss/mtp"], line["grad_norm"]) == ("NaN", "Infinity", "-Infinity")
    assert (line["load/layer_01/max_violation"], line["more"]) == ("NaN", ["Infinity", {"deep": "-Infinity"}])
    (event,) = read_metrics(path)
    assert isinstance(event, StepLogged)
    assert math.isnan(event.loss)
    assert (event.mtp_loss, event.grad_norm) == (math.inf, -math.inf)
    assert math.isnan(event.metric("load/layer_01/max_violation") or 0.0)
    assert event.metric("load/max_violation") is None


EVENTS: tuple[Event, ...] = (
    RUN,
    InitialWeightsLoaded(step=0, checkpoint="step_00000002"),
    RunResumed(step=4),
    STEP,
    step(7, mtp_loss=None, projected_gpu_hours=0.5),
    EVALUATION,
    replace(EVALUATION, averaged_loss=5.125),
    TextSampled(step=1, text="NaN"),
    CheckpointSaved(step=1, path="step_00000001"),
    MemoryMeasured(step=2, quantity="bytes", limit=None, now=(1, 2), peak=(3, 4)),
    TraceWritten(step=2, path="trace.json", metrics={"trace/F": [0.5, 0.25]}),
    BudgetReported(
        step=9,
        metrics={"gpu_ms/allocated": 4},
        gpu_hours=0.5,
        gpu_hours_per_trillion_tokens=None,
        published_gpu_hours_per_trillion_tokens=180_000,
        budget_share=0.25,
    ),
    RunStopped(step=9, reason="done"),
    WarningRaised(step=9, message="a sink failed"),
)


def test_an_event_of_each_kind_is_read_as_it_was_written() -> None:
    assert {event.kind for event in EVENTS} == set(EVENT_KINDS)
    for event in EVENTS:
        assert parse_event(Path("metrics.jsonl"), 1, event.to_json_line()) == replace(event, time=round(event.time, 3))


def test_an_event_of_a_later_version_is_read_without_what_is_new() -> None:
    for line, expected in (
        ('{"time": 1, "kind": "cooled", "step": 3, "degrees": 4}', Event(step=3, time=1.0)),
        (
            '{"time": 1, "kind": "stop", "step": 3, "reason": "done", "degrees": 4}',
            RunStopped(step=3, time=1.0, reason="done"),
        ),
    ):
        assert parse_event(Path("metrics.jsonl"), 1, line) == expected


@pytest.mark.parametrize(
    ("event", "key", "value", "gist"),
    [
        (STEP, "loss", "3", "loss = '3': must be a number"),
        (STEP, "loss/mtp", True, "loss/mtp = True: must be a number"),
        (STEP, "learning_rate", "NaN", "learning_rate = 'NaN': must be a number"),
        (STEP, "total_steps", -1, "total_steps = -1: must be from 0"),
        (STEP, "total_steps", None, "total_steps = None: must be a whole number"),
        (EVENTS[9], "now", [], "now = []: must not be empty"),
        (EVENTS[9], "peak", [1, "2"], "peak[1] = '2': must be a whole number"),
        (EVENTS[12], "reason", 4, "reason = 4: must be text"),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_key(event: Event, key: str, value: object, gist: str) -> None:
    line = json.dumps(json.loads(event.to_json_line()) | {key: value})
    with pytest.raises(ConfigError, match=re.escape(gist)):
        parse_event(Path("metrics.jsonl"), 1, line)


def test_a_missing_value_is_refused_by_its_key() -> None:
    line = json.loads(STEP.to_json_line())
    del line["loss/seq_aux"]
    with pytest.raises(ConfigError, match=r"metrics.jsonl:7 .* not an event \(loss/seq_aux = None: is missing\)"):
        parse_event(Path("metrics.jsonl"), 7, json.dumps(line))


def test_a_value_may_not_take_the_name_of_an_own_key() -> None:
    with pytest.raises(ValueError, match="kind, step"):
        step(1, metrics={"step": 1, "kind": "x"}).to_json_line()
