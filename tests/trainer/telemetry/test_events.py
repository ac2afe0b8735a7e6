"""The event file: flat, strict JSON, repaired after a crash, read back as the history of the weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.trainer.telemetry.events import Event, EventStream
from shoestring.trainer.telemetry.history import read_all_metrics, read_metrics


class Listener:
    name = "a listener"

    def __init__(self) -> None:
        self.heard: list[Event] = []
        self.closed = False

    def emit(self, event: Event) -> None:
        self.heard.append(event)

    def close(self) -> None:
        self.closed = True


class Broken:
    name = "a server"

    def emit(self, event: Event) -> None:
        raise ConnectionResetError("connection lost")

    def close(self) -> None:
        raise AssertionError("a dropped sink is not closed")


def write(run_dir: Path, *events: Event) -> None:
    stream = EventStream(run_dir, [])
    for event in events:
        stream.emit(event)
    stream.close()


def step(number: int, loss: float) -> Event:
    return Event("step", number, {"loss": loss})


def test_each_event_is_one_flat_line_and_reaches_the_sinks(tmp_path: Path) -> None:
    listener = Listener()
    stream = EventStream(tmp_path, [listener])
    event = Event("step", 3, {"loss": 2.5, "expert_load/layer_01": [4, 0, 8]}, time=12.3456)
    stream.emit(event)
    stream.close()
    expected = {"time": 12.346, "kind": "step", "step": 3, "loss": 2.5, "expert_load/layer_01": [4, 0, 8]}
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == expected
    assert listener.heard == [event]
    assert listener.closed


def test_values_that_are_not_finite_stay_readable_by_any_parser(tmp_path: Path) -> None:
    write(tmp_path, Event("step", 1, {"loss": math.nan, "more": [math.inf, {"deep": -math.inf}]}))
    (event,) = read_metrics(tmp_path / "metrics.jsonl")
    assert event.values == {"loss": "NaN", "more": ["Infinity", {"deep": "-Infinity"}]}


def test_a_value_may_not_take_the_name_of_an_own_key() -> None:
    with pytest.raises(ValueError, match="kind, step"):
        Event("step", 1, {"step": 1, "kind": "x"}).line()


@pytest.mark.parametrize("torn", ['{"time": 1, "ki', "", '{"time": 1, "kind": "step", "step": 9}'])
def test_a_torn_last_line_is_cut_on_open(tmp_path: Path, torn: str) -> None:
    write(tmp_path, step(1, 3.0))
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write(torn)
    assert [event.step for event in read_metrics(path)] == [1]
    write(tmp_path, step(2, 2.0))
    assert [event.step for event in read_metrics(path)] == [1, 2]


def test_a_file_of_one_torn_line_longer_than_a_chunk_is_emptied(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("x" * 200_000)
    write(tmp_path, step(1, 3.0))
    assert [event.step for event in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_after_a_resume_the_history_is_that_of_the_weights(tmp_path: Path) -> None:
    write(
        tmp_path, Event("run", 0, {}), *(step(n, 10.0 - n) for n in range(1, 6)), Event("evaluation", 4, {"loss": 1.0})
    )
    write(tmp_path, Event("run", 2, {}), Event("resume", 2, {}), step(3, 0.3), step(4, 0.4))
    history = read_metrics(tmp_path / "metrics.jsonl")
    assert [(event.step, event.values["loss"]) for event in history if event.kind == "step"] == [
        (1, 9.0),
        (2, 8.0),
        (3, 0.3),
        (4, 0.4),
    ]
    assert [event.kind for event in history if event.kind != "step"] == ["run", "run", "resume"]
    assert len(read_all_metrics(tmp_path / "metrics.jsonl")) == 11


def test_a_step_done_twice_counts_the_later_time(tmp_path: Path) -> None:
    write(tmp_path, step(1, 3.0), step(2, 2.0), step(2, 1.0))
    assert [event.values["loss"] for event in read_metrics(tmp_path / "metrics.jsonl")] == [3.0, 1.0]


def test_a_broken_line_and_a_missing_file_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"time": 1, "kind": "step", "step": 1}\n[]\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:2"):
        read_metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(ConfigError, match="no such file"):
        read_metrics(tmp_path / "absent.jsonl")


def test_a_sink_that_fails_is_dropped_and_the_run_goes_on(tmp_path: Path) -> None:
    listener = Listener()
    stream = EventStream(tmp_path, [Broken(), listener])
    stream.emit(step(1, 3.0))
    stream.emit(step(2, 2.0))
    stream.close()
    history = read_metrics(tmp_path / "metrics.jsonl")
    assert [event.kind for event in history] == ["step", "warning", "step"]
    assert "a server failed and is dropped: ConnectionResetError" in str(history[1].values["message"])
    assert {event.kind for event in listener.heard} == {"step", "warning"}
    assert listener.closed
