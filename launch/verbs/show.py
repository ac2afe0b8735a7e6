"""What a verb has found, on standard output."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable


def show(options: argparse.Namespace, table: Callable[[], object], tree: Callable[[], object]) -> None:
    """Print what --format asks for: `tree()` as JSON, or `table()`, text as it is and anything else as rich draws it.

    Only the one that is printed is made.
    """
    if options.format == "json":
        print(json.dumps(tree(), indent=1))
        return
    found = table()
    if isinstance(found, str):
        print(found)  # rich would break its lines
        return
    from rich.console import Console

    Console(markup=False).print(found)  # a bracket in a cell is a bracket
