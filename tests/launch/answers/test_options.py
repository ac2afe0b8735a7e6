"""Options of answers."""

from pathlib import Path

import pytest

from shoestring.launch.cli import parse_arguments


@pytest.mark.parametrize(("place", "words"), [("no/page.html", "there is no folder"), ("", "is a folder")])
def test_a_page_that_cannot_be_written_is_refused_before_the_work(
    place: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["budget", "run", "--html", str(tmp_path / place)])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_a_page_in_the_working_directory_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_arguments(["budget", "run", "--html", "page.html"]).html == Path("page.html")
