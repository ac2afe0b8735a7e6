"""What a verb has found, on standard output."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable

from ..say import give


def show(options: argparse.Namespace, table: Callable[[], object], tree: Callable[[], object]) -> None:
    """Print what --format asks for: `tree()` as JSON, or `table()`, text as it is and anything else as rich draws it.

    A tuple is printed part by part. Only the one that is asked for is made.
    """
    if options.format == "json":
        give(json.dumps(tree(), indent=1))
        return
    found = table()
    for part in found if isinstance(found, tuple) else (found,):
        if isinstance(part, str):
            give(part)  # rich would break its lines
            continue
        from rich.console import Console

        drawn, terminal = io.StringIO(), sys.stdout.isatty()
        Console(file=drawn, force_terminal=terminal or None, markup=False).print(part)  # a bracket is a bracket
        give(drawn.getvalue().removesuffix("\n"))
