"""The `shoestring` command, run in this process: exit code and output."""

import json
from typing import Any

import pytest

from shoestring.launch.answers.blocks import Answer
from shoestring.launch.cli import main, parse_arguments


def exit_code(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    code: object = stopped.value.code or 0
    assert isinstance(code, int)
    return code


def run_verb(*arguments: object) -> int:
    """Run a command without the handling of errors, and return its exit code."""
    options = parse_arguments([str(argument) for argument in arguments])
    code: int = options.run(options)
    return code


def shoestring(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Return exit code, output and errors."""
    code = exit_code(*arguments)
    output, errors = capsys.readouterr()
    return code, output, errors


def answer(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """Return the output of a command that ends with `code`, or its errors if that is not 0."""
    ended, output, errors = shoestring(capsys, *arguments)
    assert ended == code, errors
    return errors if code else output


def answer_of(*arguments: object) -> Answer:
    """Return what a verb answers, before it is printed."""
    options = parse_arguments([str(argument) for argument in arguments])
    found: Answer = options.answer(options)
    return found


def tree_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """Return the JSON that a command prints."""
    tree: dict[str, Any] = json.loads(answer(capsys, *arguments, "--format", "json"))
    return tree
