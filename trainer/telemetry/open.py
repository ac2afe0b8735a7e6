"""Opening the stream of a run with the sinks that its configuration names."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from .config import TelemetryConfig
from .events import EventStream, Sink
from .terminal import terminal_sink


def open_stream(config: TelemetryConfig, run_dir: Path, terminal: TextIO) -> EventStream:
    """Rank 0's event stream in `run_dir`, shown on `terminal` and in wandb. Raises Refused if wandb cannot start."""
    run_dir.mkdir(parents=True, exist_ok=True)
    sinks: list[Sink] = []
    if config.wandb.mode != "disabled":
        from .wandb_sink import WandbSink  # half a second of import, for the runs that use it

        sinks.append(WandbSink(config.wandb, run_dir))
    sinks.append(terminal_sink(terminal))
    return EventStream(run_dir, sinks)
