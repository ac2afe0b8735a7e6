"""A run that continues while it is followed."""

import io
from pathlib import Path

from rich.console import Console

from shoestring.launch.report.run_follower import RunFollower
from shoestring.launch.report.watch_frame import render_frame
from shoestring.trainer.telemetry.events import Event
from shoestring.trainer.telemetry.stream import EventStream


def shown(follower: RunFollower, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render_frame(follower.poll()))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def append(run_dir: Path, *told: Event) -> None:
    stream = EventStream(run_dir, [])
    for event in told:
        stream.emit(event)
    stream.close()
