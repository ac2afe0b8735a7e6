"""Options that verbs have in common, and the printing of what a verb has found."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ..console import print_or_raise

# argparse has no public name for it, and it cannot be subscripted at run time.
if TYPE_CHECKING:
    Subparsers: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Subparsers = argparse._SubParsersAction


def add_subcommands(verb: argparse.ArgumentParser) -> Subparsers:
    """Let a verb have verbs of its own, and want one."""
    return verb.add_subparsers(dest="action", required=True)


def add_override_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The same parser, for a verb about what a configuration describes."""
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="group=choice or key=value, as in Hydra")
    parser.add_argument("--config-dir", type=Path, help="a directory with configuration groups of your own")
    return parser


def get_overrides(options: argparse.Namespace) -> tuple[list[str], Path | None]:
    """What `add_override_arguments` has asked for: overrides, and where more groups are."""
    return options.overrides, options.config_dir


def add_format_option(parser: argparse.ArgumentParser) -> None:
    """--format, which `print_result` follows."""
    parser.add_argument("--format", choices=["table", "json"], default="table")


def print_result(options: argparse.Namespace, table: Callable[[], object], tree: Callable[[], object]) -> None:
    """Print what --format asks for: `tree()` as JSON, or `table()`, text as it is and anything else as rich draws it.

    A tuple is printed part by part. Only the one that is asked for is made.
    """
    if options.format == "json":
        print_or_raise(json.dumps(tree(), indent=1))
        return
    found = table()
    for part in found if isinstance(found, tuple) else (found,):
        if isinstance(part, str):
            print_or_raise(part)  # rich would break its lines
            continue
        from rich.console import Console

        drawn, terminal = io.StringIO(), sys.stdout.isatty()
        Console(file=drawn, force_terminal=terminal or None, markup=False).print(part)  # a bracket is a bracket
        print_or_raise(drawn.getvalue().removesuffix("\n"))
