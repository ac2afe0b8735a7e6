"""Metrics of a long run: all rare events, and a sample of the steps that shows every turn of the loss."""

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.comm.files.line_reader import count_lines, truncate_partial_line
from shoestring.tests.trainer.telemetry.written_events import EVALUATION, run, step, write
from shoestring.trainer.telemetry import downsample as sampled
from shoestring.trainer.telemetry.downsample import open_tail_reader, read_downsampled_metrics
from shoestring.trainer.telemetry.events import Event, RunResumed, StepLogged, WarningRaised
from shoestring.trainer.telemetry.history import MetricsHistory, MetricsReader, read_metrics


def test_of_a_short_run_everything_is_read(tmp_path: Path) -> None:
    others = [WarningRaised(step=7, about="spike", message="up"), RunResumed(step=5)]
    path = write(tmp_path, run(), *map(step, range(1, 9)), *others, *map(step, range(6, 9)))
    assert read_downsampled_metrics(path) == read_metrics(path)


def test_of_a_long_run_spikes_and_all_that_is_rare_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled, "MAX_STEPS_KEPT", 64)
    monkeypatch.setattr(sampled.StepDownsampler.__init__, "__defaults__", (64, 10**9))
    events: list[Event] = [run()]
    for number in range(1, 5001):
        events.append(step(number, {777: 99.0, 4242: float("nan"), 3333: -1.0}.get(number, 5 - number / 5000)))
        if number % 500 == 0:
            events.append(replace(EVALUATION, step=number))
    found = read_downsampled_metrics(write(tmp_path, *events))
    steps = [event.step for event in found if event.kind == "step"]
    assert steps == sorted(steps)
    assert 32 <= len(steps) <= 70
    assert {777, 3333} <= set(steps)
    assert max(after - before for before, after in pairwise(steps)) <= 4 * 5000 / 32
    assert [event.step for event in found if event.kind == "evaluation"] == [*range(500, 5001, 500)]


def test_steps_that_were_undone_are_in_no_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled.StepDownsampler.__init__, "__defaults__", (16, 10**9))
    path = write(tmp_path, *map(step, range(1, 201)), RunResumed(step=100), *(step(n, 1.0) for n in range(101, 150)))
    found = [event for event in read_downsampled_metrics(path) if isinstance(event, StepLogged)]
    assert max(event.step for event in found) < 150
    assert all(event.loss == (3.0 if event.step <= 100 else 1.0) for event in found)


def test_the_bytes_of_a_sample_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled.StepDownsampler.__init__, "__defaults__", (4096, 140_000))
    path = write(tmp_path, *map(step, range(1, 2001)))
    found = read_downsampled_metrics(path)
    assert 50 < len(found) < 300


def test_a_broken_line_that_looks_like_no_step_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, step(1))
    with path.open("a") as file:
        file.write("not json\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:2"):
        read_downsampled_metrics(path)


def test_a_reader_of_the_tail_begins_at_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, *map(step, range(1, 101)))
    size = path.stat().st_size // 100
    for tail in (3 * size, 3 * size + 1, 3 * size - 1):
        events = MetricsReader(path, open_tail_reader(path, tail)).new_events()
        assert [event.step for event in events][-2:] == [99, 100]
        assert len(events) in (2, 3)
    assert len(MetricsReader(path, open_tail_reader(path, 10**9)).new_events()) == 100
    assert count_lines(path) == 100


def test_a_history_keeps_the_last_ones(tmp_path: Path) -> None:
    history = MetricsHistory(most=10)
    for number in range(1, 1001):
        history.add_events([step(number)])
    steps = [event.step for event in history.events]
    assert 10 <= len(steps) <= 20
    assert steps[-1] == 1000


def test_metrics_of_holes_are_refused_in_no_time(tmp_path: Path) -> None:
    """A sparse file of 1 TB, without a newline."""
    path = write(tmp_path, step(1))
    os.truncate(path, 2**40)
    readers: list[Callable[[Path], object]] = [read_metrics, read_downsampled_metrics, count_lines]
    readers.append(lambda path: MetricsReader(path).new_events())
    for read in readers:
        with pytest.raises(ConfigError, match=r"metrics.jsonl.* line of more than 8388608 bytes"):
            read(path)
    with pytest.raises(ConfigError, match="ends in more than 8388608 bytes without a newline; restore the file"):
        truncate_partial_line(path)
    assert path.stat().st_size == 2**40
