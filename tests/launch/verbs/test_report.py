"""`shoestring report` as a command: where it writes, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoestring.tests.launch.command_line import exit_code
from shoestring.tests.launch.report.reader import Reader
from shoestring.tests.launch.report.recorded import STEPS, record_run


def test_the_command_writes_to_the_given_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_run(tmp_path / "run")
    assert exit_code("report", tmp_path / "run") == 0
    assert exit_code("report", tmp_path / "run", "--out", tmp_path / "page.html") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"Wrote {tmp_path / 'run' / 'report.html'}",
        f"Wrote {tmp_path / 'page.html'}",
    ]
    assert f"step {STEPS}" in Reader((tmp_path / "page.html").read_text()).words()


def test_what_is_no_run_or_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other").mkdir()
    record_run(tmp_path / "run")
    for arguments, field in (
        (("report", tmp_path / "absent"), "RUN = "),
        (("report", tmp_path / "other"), "RUN = "),
        (("report", tmp_path / "run", "--out", tmp_path / "absent" / "page.html"), "--out = "),
    ):
        assert exit_code(*arguments) == 2
        assert field in capsys.readouterr().err
    assert not list((tmp_path / "other").iterdir())
