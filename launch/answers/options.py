"""Options of verbs that answer a question, and printing of the answer."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ...comm.errors import ConfigError, Problem
from ..console import print_or_raise, print_to_stderr
from .blocks import Answer


def add_override_arguments(parser: argparse.ArgumentParser, *, with_fresh: bool = False) -> None:
    """Add the options of a verb that composes a configuration; with --fresh for one that trains."""
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="group=choice or key=value, as in Hydra")
    parser.add_argument("--config-dir", type=Path, help="directory with your own configuration groups")
    if with_fresh:
        text = "first delete the files of an earlier run in training.run_dir"
        parser.add_argument("--fresh", action="store_true", help=text)


def add_answer_options(
    parser: argparse.ArgumentParser, formats: Sequence[str] = ("table", "json"), text: str = "output format"
) -> None:
    """Add --format, whose default is the first of `formats`, and --html; `print_answer` and `write_page` read them."""
    parser.add_argument("--format", choices=formats, default=formats[0], help=f"{text} (default {formats[0]})")
    parser.add_argument("--html", type=_new_file, metavar="FILE", help="also write the answer as an HTML page")


def _new_file(text: str) -> Path:
    """Return a path in an existing folder; anything else is an error now, not after minutes of work."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {path.parent}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file in it")
    return path


def print_answer(options: argparse.Namespace, answer: Answer) -> int:
    """Print the answer as --format says, write the page of --html, and return the verb's exit code."""
    write_page(options, answer)
    if options.format == "json":
        print_or_raise(json.dumps(answer.data, indent=1))
    else:
        from .terminal import terminal_text

        print_or_raise(terminal_text(answer))
    return answer.exit_code


def write_page(options: argparse.Namespace, answer: Answer) -> None:
    """Write the page of --html, if it is given. Raises `ConfigError` if it cannot be written."""
    if options.html is None:
        return
    from .page import html_page

    write_output(options.html, html_page(answer, f"shoestring {options.verb}"), "--html")
    print_to_stderr(f"Wrote {options.html}")


def write_output(path: Path, text: str, option: str) -> None:
    """Write `text` to the file of `option`. Raises `ConfigError` if it cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError([Problem(option, str(path), f"cannot be written: {error.strerror}")]) from None
