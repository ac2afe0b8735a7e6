"""Options that verbs have in common, and printing of results."""

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
    """Give a verb subcommands, one of which is required."""
    return verb.add_subparsers(dest="action", required=True)


def add_override_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options of a verb that composes a configuration; return `parser`."""
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="group=choice or key=value, as in Hydra")
    parser.add_argument("--config-dir", type=Path, help="directory with your own configuration groups")
    return parser


def get_overrides(options: argparse.Namespace) -> tuple[list[str], Path | None]:
    """Return the overrides and the configuration directory of `add_override_arguments`."""
    return options.overrides, options.config_dir


def add_format_option(parser: argparse.ArgumentParser) -> None:
    """Add --format, which `print_result` reads."""
    parser.add_argument("--format", choices=["table", "json"], default="table", help="output format (default table)")


def print_result(options: argparse.Namespace, table: Callable[[], object], tree: Callable[[], object]) -> None:
    """Print `tree()` as JSON or `table()`, as --format says. Only the chosen one is called.

    A string is printed as it is, anything else by rich; a tuple is printed part by part.
    """
    if options.format == "json":
        print_or_raise(json.dumps(tree(), indent=1))
        return
    found = table()
    for part in found if isinstance(found, tuple) else (found,):
        if isinstance(part, str):
            print_or_raise(part)  # rich would wrap its lines
            continue
        from rich.console import Console

        drawn, terminal = io.StringIO(), sys.stdout.isatty()
        Console(file=drawn, force_terminal=terminal or None, markup=False).print(part)  # no markup: brackets are text
        print_or_raise(drawn.getvalue().removesuffix("\n"))
