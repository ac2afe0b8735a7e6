"""The stream of events: a file that is repaired after a crash, and sinks that may fail."""

import json
from pathlib import Path

import pytest

from shoestring.tests.trainer.telemetry.written_events import step, write
from shoestring.trainer.telemetry.events import Event, WarningRaised
from shoestring.trainer.telemetry.history import read_metrics
from shoestring.trainer.telemetry.stream import EventStream


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


def test_each_event_is_one_flat_line_and_reaches_the_sinks(tmp_path: Path) -> None:
    listener = Listener()
    stream = EventStream(tmp_path, [listener])
    event = WarningRaised(step=3, about="spike", message="up", time=12.3456)
    stream.emit(event)
    stream.close()
    expected = {"time": 12.346, "kind": "warning", "step": 3, "about": "spike", "message": "up"}
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == expected
    assert listener.heard == [event]
    assert listener.closed


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


def test_a_sink_that_fails_is_dropped_and_the_run_continues(tmp_path: Path) -> None:
    listener = Listener()
    stream = EventStream(tmp_path, [Broken(), listener])
    stream.emit(step(1, 3.0))
    stream.emit(step(2, 2.0))
    stream.close()
    history = read_metrics(tmp_path / "metrics.jsonl")
    assert [event.kind for event in history] == ["step", "warning", "step"]
    assert "a server failed and was dropped: ConnectionResetError" in str(history[1].values["message"])
    assert {event.kind for event in listener.heard} == {"step", "warning"}
    assert listener.closed
