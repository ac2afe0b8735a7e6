"""`shoestring report` as a command: where it writes, and refusals."""

from pathlib import Path

import pytest

from shoestring import __version__
from shoestring.launch.report.budget import cost_as_dict
from shoestring.launch.report.page import report_answer
from shoestring.launch.report.run_record import read_run_record
from shoestring.tests.launch.command_line import answer, exit_code, shoestring, tree_of
from shoestring.tests.launch.renderings import check_renderings
from shoestring.tests.launch.report.reader import Reader
from shoestring.tests.launch.report.recorded import STEPS, record_run, record_trace
from shoestring.tests.trainer.ledger.small_ledger import OPENING_OF_FORMAT_1
from shoestring.tests.trainer.telemetry.written_events import RUN_OF_FORMAT_1
from shoestring.trainer.ledger.summary import summarize_ledger


def test_the_command_writes_to_the_given_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_run(tmp_path / "run")
    assert exit_code("report", tmp_path / "run") == 0
    assert exit_code("report", tmp_path / "run", "--html", tmp_path / "page.html") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"Wrote {tmp_path / 'run' / 'report.html'}",
        f"Wrote {tmp_path / 'page.html'}",
    ]
    assert f"step {STEPS}" in Reader((tmp_path / "page.html").read_text()).words()


def test_the_figures_as_text_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_run(tmp_path)
    tree = tree_of(capsys, "report", tmp_path)
    assert (tmp_path / "report.html").exists()
    assert (tree["state"], tree["version"]) == ("done", __version__)
    assert tree["figures"]["goodput"]["value"] == "72.0 %"
    assert tree["ledger"] == cost_as_dict(summarize_ledger(tmp_path))
    assert "72.0 %" in answer(capsys, "report", tmp_path, "--format", "table")
    record_trace(tmp_path)
    check_renderings(report_answer(read_run_record(tmp_path)), smallest_number_of_quantities=40)


def test_what_is_no_run_or_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other").mkdir()
    record_run(tmp_path / "run")
    for arguments, field in (
        (("report", tmp_path / "absent"), "RUN = "),
        (("report", tmp_path / "other"), "RUN = "),
        (("report", tmp_path / "run", "--html", tmp_path / "absent" / "page.html"), "--html = "),
    ):
        assert exit_code(*arguments) == 2
        assert field in capsys.readouterr().err
    assert not list((tmp_path / "other").iterdir())


@pytest.mark.parametrize("verb", [["report"], ["watch", "--once"]])
@pytest.mark.parametrize(
    ("file", "text", "kind"),
    [("ledger/allocation.jsonl", OPENING_OF_FORMAT_1, "ledger"), ("metrics.jsonl", RUN_OF_FORMAT_1, "metrics")],
)
def test_a_run_of_another_format_is_refused_and_nothing_is_written(
    file: str, text: str, kind: str, verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    record_run(run_dir)
    (run_dir / file).write_text(text)
    code, output, errors = shoestring(capsys, *verb, run_dir)
    assert (code, output) == (2, "")
    assert f"{run_dir / file}:1: format" in errors
    assert f"reads {kind} format 2; use the version that wrote it, or start a new run in another directory" in errors
    assert not (run_dir / "report.html").exists()


@pytest.mark.parametrize("verb", ["report", "watch", "budget"])
def test_a_missing_run_has_one_name_in_every_command(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    errors = shoestring(capsys, verb, "nothere")[2]
    assert "RUN = 'nothere': " in errors
