"""`shoestring schedule` draws programs that it has checked, and refuses others with a message."""

import json
from pathlib import Path

import pytest

from shoestring.parallelism.pipeline.program import program_as_dict
from shoestring.parallelism.pipeline.schedules.registry import build_program
from shoestring.tests.launch.command_line import exit_code


def schedule(*arguments: str) -> int:
    return exit_code("schedule", *arguments)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert schedule("dualpipe", "--pp", "4", "--micro-batches", "10", "--format", "json") == 0
    assert json.loads(capsys.readouterr().out) == program_as_dict(build_program("dualpipe", 4, 10))


def test_ascii_is_the_default_and_times_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert schedule("1f1b", "--pp", "2", "--micro-batches", "2") == 0
    assert "makespan 9, bubble 33.3 %" in capsys.readouterr().out
    assert schedule("1f1b", "--pp", "2", "--micro-batches", "2", "--times", "F=1,I=0.5,W=0.5") == 0
    assert "makespan 6, bubble 33.3 %" in capsys.readouterr().out
    assert schedule("1f1b", "--pp", "2", "--micro-batches", "2", "--times", "B=3") == 0
    assert "makespan 12, " in capsys.readouterr().out


def test_svg_into_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "dualpipev.svg"
    size = ("dualpipev", "--pp", "2", "--micro-batches", "4")
    assert schedule(*size, "--format", "svg", "--times", "FB=2.5", "--output", str(picture)) == 0
    assert capsys.readouterr().out == ""
    text = picture.read_text()
    assert text.startswith("<svg ")
    assert "F = 1, B = 2, I = 1, W = 1, FB = 2.5" in text


def test_a_page_with_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "schedule.html"
    size = ("dualpipev", "--pp", "2", "--micro-batches", "4")
    assert schedule(*size, "--format", "table", "--html", str(page)) == 0
    drawn = capsys.readouterr().out
    assert schedule(*size) == 0
    assert drawn == capsys.readouterr().out
    assert "<svg " in page.read_text()
    assert "dualpipev: 2 ranks, 2 chunks per rank, 4 micro-batches" in page.read_text()


def test_interleaved_with_more_chunks(capsys: pytest.CaptureFixture[str]) -> None:
    assert schedule("interleaved", "--pp", "2", "--micro-batches", "2", "--chunks", "3") == 0
    assert "interleaved: 2 ranks, 3 chunks per rank, 2 micro-batches" in capsys.readouterr().out


def test_everything_wrong_is_refused_together(capsys: pytest.CaptureFixture[str]) -> None:
    times = "F=0,Q=1,I"
    assert schedule("dualpipe", "--pp", "3", "--micro-batches", "5", "--chunks", "3", "--times", times) == 2
    first, *others = capsys.readouterr().err.splitlines()
    assert first == "shoestring schedule: error"
    assert [line.split(":")[0].strip() for line in others] == [
        "--pp = 3",
        "--chunks = 3",
        "--micro-batches = 5",
        "--times = 'F=0'",
        "--times = 'Q=1'",
        "--times = 'I'",
    ]
    assert "nearest 2 or 4" in others[0]


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing" / "x.svg"
    assert schedule("gpipe", "--pp", "1", "--micro-batches", "1", "--output", str(missing)) == 2
    assert "--output" in capsys.readouterr().err
