"""Files of whole lines: a partial last line is neither read nor extended."""

from pathlib import Path

import pytest

from shoestring.comm.files.line_reader import (
    FileReplacedError,
    LineReader,
    count_lines,
    read_complete_lines,
    truncate_partial_line,
)


def test_a_torn_last_line_is_left_out_and_cut(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    truncate_partial_line(path)
    assert not path.exists()
    path.write_text("first\nsecond\nto")
    assert count_lines(path) == 2
    assert list(read_complete_lines(path)) == [(1, "first"), (2, "second")]
    truncate_partial_line(path)
    assert path.read_text() == "first\nsecond\n"


def test_a_file_that_grows_is_read_on_and_another_one_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("first\nsec")
    reader = LineReader(path)
    assert list(reader.read_new_lines()) == [(1, "first")]
    with path.open("a") as file:
        file.write("ond\n")
    assert list(reader.read_new_lines()) == [(2, "second")]
    path.write_text("")
    with pytest.raises(FileReplacedError):
        list(reader.read_new_lines())
