"""Files of whole lines: half a line at the end is neither read nor built upon."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoestring.comm.files.lines import LineReader, Replaced, count_lines, cut_torn_line, whole_lines


def test_a_torn_last_line_is_left_out_and_cut(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    cut_torn_line(path)
    assert not path.exists()
    path.write_text("first\nsecond\nto")
    assert count_lines(path) == 2
    assert list(whole_lines(path)) == [(1, "first"), (2, "second")]
    cut_torn_line(path)
    assert path.read_text() == "first\nsecond\n"


def test_a_file_that_grows_is_read_on_and_another_one_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("first\nsec")
    reader = LineReader(path)
    assert list(reader.new_lines()) == [(1, "first")]
    with path.open("a") as file:
        file.write("ond\n")
    assert list(reader.new_lines()) == [(2, "second")]
    path.write_text("")
    with pytest.raises(Replaced):
        list(reader.new_lines())
