"""`shoestring data prepare` by executors, and its options."""

from pathlib import Path

import pytest

from shoestring.tests.launch.command_line import shoestring

TEXT = "The owl and the pussycat went to sea in a beautiful pea-green boat. "


@pytest.fixture
def verb(tmp_path: Path) -> list[str]:
    (corpus := tmp_path / "corpus").mkdir()
    for name in ("alpha", "held"):
        (corpus / f"{name}.txt").write_text(TEXT * 20)
    sizes = ("data.vocab_size=300", "model.vocab_size=null", "data.validation=[held]")
    return ["data", "prepare", f"data.corpus={corpus}", f"data.prepared={tmp_path}/prepared", *sizes]


def test_an_executor_of_datatrove_prepares(verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, errors = shoestring(
        capsys, *verb, "--executor", "local", "--jobs", "1", "--executor-option", "workers=1"
    )
    assert code == 0, errors
    assert "2 of 2 tasks were finished before and are kept." in output
    assert (tmp_path / "prepared" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("options", "gist"),
    [
        (["--jobs", "2"], "--executor = None: must name an executor"),
        (["--executor-option", "a=1"], "--executor = None: must name an executor"),
        (["--executor", "local", "--jobs", "0"], "--jobs = 0: must be at least 1"),
        (["--executor", "local", "--executor-option", "workers"], "must be KEY=VALUE"),
        (["--executor", "local", "--executor-option", "nosuch=1"], "nosuch"),
    ],
)
def test_options_that_do_nothing_or_do_not_exist_are_refused(
    verb: list[str], options: list[str], gist: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, errors = shoestring(capsys, *verb, *options)
    assert code == 2
    assert gist in errors
