"""What verbs have in common on the command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeAlias

# argparse has no public name for it; a string, for it cannot be subscripted where it runs.
Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_actions(verb: argparse.ArgumentParser) -> Verbs:
    """Let a verb have verbs of its own, and want one."""
    return verb.add_subparsers(dest="action", required=True)


def with_overrides(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The same parser, for a verb about what a configuration describes."""
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="group=choice or key=value, as in Hydra")
    parser.add_argument("--config-dir", type=Path, help="a directory with configuration groups of your own")
    return parser


def described(options: argparse.Namespace) -> tuple[list[str], Path | None]:
    """What `with_overrides` has asked for: overrides, and where more groups are."""
    return options.overrides, options.config_dir


def add_format(parser: argparse.ArgumentParser) -> None:
    """--format, which `show` follows."""
    parser.add_argument("--format", choices=["table", "json"], default="table")
