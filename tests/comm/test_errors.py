"""Error messages: no control code reaches the terminal."""

from shoestring.comm.errors import Problem
from shoestring.comm.files.strict_json import MalformedFileError


def test_a_problem_sends_nothing_to_the_terminal() -> None:
    """Field, value and hint are escaped. A line break in our own message stays; one in a name does not."""
    said = str(Problem("a\x1b[31m\n\x07\u202e", "\x1b\x07", "holds \x1b]0;\x9b;\nwrite it again"))
    assert said == r"a\x1b[31m\n\x07\u202e = '\x1b\x07': holds \x1b]0;\x9b;" + "\nwrite it again"
    assert str(MalformedFileError("\x1b[2J", 1, "must be \x07")) == r"\x1b[2J = 1: must be \x07"
    assert str(Problem("é 語", 1, "stays")) == "é 語 = 1: stays"
