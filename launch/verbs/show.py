"""What a verb has found, on standard output."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable


def show(options: argparse.Namespace, table: Callable[[], object], tree: Callable[[], object]) -> None:
    """Print what --format asks for: `tree()` as JSON, or `table()`, text as it is and anything else as rich draws it.

    A tuple is printed part by part. Only the one that is asked for is made.
    """
    if options.format == "json":
        print(json.dumps(tree(), indent=1))
        return
    found = table()
    for part in found if isinstance(found, tuple) else (found,):
        if isinstance(part, str):
            print(part)  # rich would break its lines
            continue
        from rich.console import Console

        Console(markup=False).print(part)  # a bracket in a cell is a bracket
