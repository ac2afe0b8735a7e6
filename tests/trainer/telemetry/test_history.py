"""Reading `metrics.jsonl` back: the history of the retained steps, and refused lines."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shoestring import __version__
from shoestring.comm.errors import ConfigError
from shoestring.tests.launch.command_line import shoestring
from shoestring.tests.launch.refusals import refused
from shoestring.tests.launch.report.recorded import record_run
from shoestring.tests.launch.small_checkpoint import fifo, folder
from shoestring.tests.trainer.telemetry.written_events import EVALUATION, RUN, RUN_OF_FORMAT_1, run, step, write
from shoestring.trainer.telemetry.downsample import read_downsampled_metrics
from shoestring.trainer.telemetry.events import RunResumed
from shoestring.trainer.telemetry.history import (
    MetricsReader,
    check_metrics_format,
    metrics_table,
    read_all_metrics,
    read_metrics,
)


@pytest.mark.parametrize(
    ("harm", "gist"),
    [
        (lambda run: (run / "metrics.jsonl").write_text('{"kind": 5, "step": 1, "time": 1}\n'), "must be text"),
        (lambda run: (run / "metrics.jsonl").write_text('{"kind": "a", "step": 1.5, "time": 1}\n'), "a whole number"),
        (lambda run: (run / "metrics.jsonl").write_text('{"kind": "a", "step": 1, "time": 1e99}\n'), "time = 1e+99"),
        (lambda run: (run / "metrics.jsonl").write_text('{"kind": "a", "step": 1, "time": NaN}\n'), "NaN"),
        (
            lambda run: (run / "metrics.jsonl").write_text(
                f'{{"kind": "step", "step": 9, "time": 1, "loss": {10**400}}}\n'
            ),
            "loss = '1000",
        ),
        (lambda run: (run / "metrics.jsonl").write_bytes(b'{"kind": "\xff", "step": 1, "time": 1}\n'), "UTF-8"),
        (lambda run: (run / "metrics.jsonl").write_text("[" * 99999 + "\n"), "nested"),
        (lambda run: folder(run / "metrics.jsonl"), "is a folder"),
        (lambda run: fifo(run / "metrics.jsonl"), "is a FIFO"),
    ],
)
def test_metrics_of_wrong_values_are_refused_by_line(
    harm: Callable[[Path], object], gist: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    record_run(run_dir)
    harm(run_dir)
    for verb in (["report", run_dir], ["watch", run_dir, "--once"]):
        code, _, errors = shoestring(capsys, *verb)
        assert code == 2, errors
        assert "metrics.jsonl" in errors
        assert gist in errors


def test_after_a_resume_the_history_is_that_of_the_weights(tmp_path: Path) -> None:
    write(tmp_path, run(), *(step(n, 10.0 - n) for n in range(1, 6)), replace(EVALUATION, step=4))
    write(tmp_path, run(2), RunResumed(step=2), step(3, 0.3), step(4, 0.4))
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
    (tmp_path / "metrics.jsonl").write_text('{"time": 1, "kind": "resume", "step": 1}\n[]\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:2"):
        read_metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(ConfigError, match="no such file"):
        read_metrics(tmp_path / "absent.jsonl")


READERS: list[Callable[[Path], object]] = [
    read_metrics,
    read_all_metrics,
    read_downsampled_metrics,
    check_metrics_format,
    lambda path: MetricsReader(path).new_events(),
]


@pytest.mark.parametrize("read", READERS)
def test_metrics_without_a_format_are_refused_in_one_sentence(read: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(RUN_OF_FORMAT_1)
    write(tmp_path, step(1, 3.0))
    assert refused(read, path) == {
        f"{path}:1: format": f"1: Shoestring {__version__} reads metrics format 2; "
        "use the version that wrote it, or start a new run in another directory"
    }


@pytest.mark.parametrize("read", READERS)
def test_metrics_of_a_later_format_name_the_version_that_wrote_them(
    read: Callable[[Path], object], tmp_path: Path
) -> None:
    write(tmp_path, replace(RUN, format=3, version="0.9.0"), step(1, 3.0))
    with pytest.raises(ConfigError, match=r"jsonl:1: format = 3: .* use Shoestring 0\.9\.0 that wrote it"):
        read(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("read", READERS)
def test_metrics_of_a_run_that_has_just_begun_are_read(read: Callable[[Path], object], tmp_path: Path) -> None:
    """The file is empty, or its first event is still being written, or it was deleted and begun again in mid-run."""
    path = tmp_path / "metrics.jsonl"
    for text in ("", RUN_OF_FORMAT_1[:40], step(7, 3.0).to_json_line() + "\n"):
        path.write_text(text)
        read(path)
    check_metrics_format(tmp_path / "absent.jsonl")


def test_a_table_has_a_row_per_retained_step_and_numbers_that_are_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    events = [
        step(1, 2.0, metrics={"bytes": 8}, time=10.0),
        step(2, 9.0, time=11.0),
        RunResumed(step=1, time=12.0),
        step(2, float("-inf"), metrics={"load": float("nan"), "text": "ok"}, time=13.0),
    ]
    path.write_text("".join(event.to_json_line() + "\n" for event in events))
    expected = {
        "step": [1, 2],
        "time": [10.0, 13.0],
        "loss": [2.0, float("-inf")],
        "loss/mtp": [5.4, 5.4],
        "bytes": [8, None],
        "text": [None, "ok"],
    }
    for place in (tmp_path, path):
        table = metrics_table(place, "step")
        assert {key: table[key] for key in expected} == expected
        assert table["load"][0] is None
        assert math.isnan(table["load"][1])
    with pytest.raises(ConfigError, match="no such file; name the metrics"):
        metrics_table(tmp_path / "none", "step")
