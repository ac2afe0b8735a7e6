"""A sink may fail or be slow: the run neither stops nor waits, and reports the sink's failure."""

import threading
import time
from pathlib import Path

import pytest

from shoestring.tests.trainer.telemetry.written_events import step
from shoestring.trainer.telemetry.background_sink import BackgroundSink
from shoestring.trainer.telemetry.events import Event, WarningRaised
from shoestring.trainer.telemetry.history import read_all_metrics
from shoestring.trainer.telemetry.stream import EventStream, Sink


class Slow:
    """A sink that blocks until it is released."""

    name = "a slow server"

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.heard: list[int] = []
        self.closed = False

    def emit(self, event: Event) -> None:
        self.may_go_on.wait()
        self.heard.append(event.step)

    def close(self) -> None:
        self.closed = True


def warnings(run_dir: Path) -> list[str]:
    events = read_all_metrics(run_dir / "metrics.jsonl")
    return [event.message for event in events if isinstance(event, WarningRaised)]


def test_everything_arrives_in_order_before_the_end(tmp_path: Path) -> None:
    sink = Slow()
    sink.may_go_on.set()
    stream = EventStream(tmp_path, [BackgroundSink(lambda: sink, name="view")])
    for number in range(500):
        stream.emit(step(number))
    stream.close()
    assert sink.heard == list(range(500))
    assert sink.closed
    assert not warnings(tmp_path)


def test_a_slow_view_costs_the_run_no_time_and_loses_what_does_not_fit(tmp_path: Path) -> None:
    sink = Slow()
    background = BackgroundSink(lambda: sink, name="view", max_queued_events=10, close_timeout_seconds=30)
    stream = EventStream(tmp_path, [background])
    start = time.perf_counter()
    for number in range(200):
        stream.emit(step(number))
    assert time.perf_counter() - start < 1  # the sink gets no event meanwhile
    sink.may_go_on.set()
    stream.close()
    assert len(read_all_metrics(tmp_path / "metrics.jsonl")) == 201
    assert sink.heard == sorted(set(sink.heard))
    assert 10 <= len(sink.heard) <= 12
    (warning,) = warnings(tmp_path)
    assert f"view was too slow: {200 - len(sink.heard)} events were dropped" in warning


def test_a_sink_that_never_finishes_delays_the_end_for_a_limited_time(tmp_path: Path) -> None:
    sink = Slow()
    stream = EventStream(tmp_path, [BackgroundSink(lambda: sink, name="view", close_timeout_seconds=0.1)])
    stream.emit(step(1))
    start = time.perf_counter()
    stream.close()
    assert time.perf_counter() - start < 5
    assert "view has not finished after 0.1 s" in warnings(tmp_path)[0]
    sink.may_go_on.set()


@pytest.mark.timeout(20)
def test_a_sink_that_does_not_open_is_dropped_and_the_run_continues(tmp_path: Path) -> None:
    def fail() -> Sink:
        raise ConnectionRefusedError("no server")

    background = BackgroundSink(fail, name="view")
    stream = EventStream(tmp_path, [background])
    number = 0
    while not warnings(tmp_path):
        stream.emit(step(number := number + 1))
    stream.emit(step(number + 1))
    stream.close()
    assert len(warnings(tmp_path)) == 1
    assert "no server" in warnings(tmp_path)[0]
