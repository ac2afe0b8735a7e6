"""`shoestring trace` on a written timeline, and refusals."""

import json
from pathlib import Path

import pytest

from shoestring.launch.verbs.trace import open_trace, trace_answer
from shoestring.tests.launch.command_line import exit_code
from shoestring.tests.launch.renderings import check_renderings
from shoestring.tests.launch.report.layer_spans import trace
from shoestring.trainer.telemetry.trace import merge_rank_traces, write_rank_trace


def run(*arguments: str | Path) -> int:
    return exit_code("trace", *arguments)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    write_rank_trace(tmp_path / "trace", 0, trace())
    merge_rank_traces(tmp_path / "trace", 1)
    return tmp_path


def test_terms_and_picture_of_a_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = run_dir / "pair.svg"
    assert run(run_dir, "--svg", picture) == 0
    printed = capsys.readouterr().out
    assert "350.0" in printed  # FB of 380 ms, without 30 of waiting
    assert "pipeline_wait" not in printed
    assert picture.read_text().startswith("<svg ")
    assert run(run_dir / "trace" / "trace.json", "--format", "json") == 0
    assert json.loads(capsys.readouterr().out)["0"]["1F1B"] == pytest.approx(0.35)
    check_renderings(trace_answer(open_trace(run_dir)), smallest_number_of_quantities=2)
    assert run(run_dir, "--html", run_dir / "page.html") == 0
    assert "<svg " in (run_dir / "page.html").read_text()


@pytest.mark.parametrize(
    ("content", "field", "hint"),
    [
        (None, "TRACE", "telemetry.trace=true"),
        ("not JSON", "TRACE", "no timeline"),
        ('{"traceEvents": [{"ph": "X"}]}', "TRACE", "no timeline"),
        ('{"traceEvents": []}', "--svg", "use dualpipe or dualpipev"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    content: str | None, field: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "trace").mkdir()
        (tmp_path / "trace" / "trace.json").write_text(content)
    assert run(tmp_path, "--svg", tmp_path / "pair.svg") == 2
    message = capsys.readouterr().err
    assert f"{field} = " in message
    assert hint in message
    assert not (tmp_path / "pair.svg").exists()


def test_a_place_that_cannot_be_written_is_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(run_dir, "--svg", run_dir / "nowhere" / "pair.svg") == 2
    assert "--svg = " in capsys.readouterr().err
