"""`shoestring watch`: live view of a run in the terminal, until it ends or Ctrl-C."""

import argparse
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .run_follower import RunFollower
from .run_record import require_run_dir

if TYPE_CHECKING:
    from rich.console import Console

REFRESH_SECONDS = 1.0
"""Seconds between frames."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--once", action="store_true", help="print the present state and exit")


def run(options: argparse.Namespace) -> int:
    """Show the run that the options name."""
    from rich.console import Console

    watch(options.run_dir, Console(), once=options.once)
    return 0


def watch(
    run_dir: Path,
    console: "Console",
    *,
    once: bool = False,
    wait_for_refresh: Callable[[], None] = lambda: time.sleep(REFRESH_SECONDS),
) -> None:
    """Show the run in `run_dir` until it ends; with `once` print one frame. Raises `ConfigError` for another directory.

    A console that is not a terminal gets the last frame only.
    """
    from rich.live import Live

    from .watch_frame import render_frame

    require_run_dir(run_dir)
    follower = RunFollower(run_dir)
    if once:
        console.print(render_frame(follower.poll()))
        return
    # Drawn after each poll, without a thread. Ctrl-C ends the view and leaves the run alone.
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            snapshot = follower.poll()
            live.update(render_frame(snapshot), refresh=True)
            if snapshot.has_ended:
                return
            wait_for_refresh()
