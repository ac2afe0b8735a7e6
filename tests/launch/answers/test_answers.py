"""An answer is printed as the options say, and its tables align their numbers."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.launch.answers.blocks import Answer, Cell, Figure, TableRow, number, table
from shoestring.launch.answers.options import add_answer_options, print_answer
from shoestring.tests.launch.renderings import check_renderings

ROWS: list[Sequence[Cell] | TableRow] = [
    ("a", number(2e9, ".1f", " GB", scale=1e-9), "-"),
    TableRow(("all", "", "-"), begins_group=True),
]
ANSWER = Answer.from_blocks("Sizes", {"a": 2e9}, [table("T", ("name", "size", "limit"), ROWS)], exit_code=1)


def options_of(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_answer_options(parser)
    return parser.parse_args(arguments, argparse.Namespace(verb="memory"))


def test_the_three_renderings_of_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert print_answer(options_of("--format", "json", "--html", str(page)), ANSWER) == 1
    output = capsys.readouterr()
    assert json.loads(output.out) == {"a": 2e9}
    assert output.err == f"Wrote {page}\n"
    assert '<td class="n">2.0 GB</td>' in page.read_text()
    assert '<tr class="group">' in page.read_text()
    assert print_answer(options_of(), ANSWER) == 1
    assert "2.0 GB" in capsys.readouterr().out
    check_renderings(ANSWER)


def test_a_page_whose_folder_is_gone_is_refused(tmp_path: Path) -> None:
    (folder := tmp_path / "folder").mkdir()
    options = options_of("--html", str(folder / "page.html"))
    folder.rmdir()
    with pytest.raises(ConfigError, match="--html"):
        print_answer(options, ANSWER)


def test_columns_of_numbers_and_dashes_are_aligned_to_the_right() -> None:
    assert table("", (), ROWS).right_aligned_columns == {1, 2}
    assert table("", (), [("a", "")]).right_aligned_columns == set()


def test_a_picture_is_drawn_only_for_the_page() -> None:
    def fail() -> None:
        raise AssertionError("drawn")

    answer = Answer.from_blocks("F", {}, [Figure("picture", fail, text="ranks")])  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="drawn"):
        check_renderings(answer, smallest_number_of_quantities=0)
    assert print_answer(options_of(), answer) == 0
