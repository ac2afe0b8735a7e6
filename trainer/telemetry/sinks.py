"""Construction of a run's event stream with its configured sinks."""

from functools import partial
from pathlib import Path
from typing import TextIO

from ...comm.files.line_reader import count_lines
from .background_sink import BackgroundSink
from .config import PrometheusConfig, TelemetryConfig, WandbConfig
from .events import METRICS_FILE
from .stream import EventStream, Sink
from .terminal import make_terminal_sink


def open_event_stream(config: TelemetryConfig, run_dir: Path, terminal: TextIO) -> EventStream:
    """Return rank 0's event stream in `run_dir`, with a terminal sink and, as configured, wandb and Prometheus.

    A failing or slow wandb or Prometheus sink does not affect the run.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    sinks: list[Sink] = []
    if config.wandb.mode != "disabled":
        metrics = run_dir / METRICS_FILE
        lines = count_lines(metrics) if metrics.exists() else 0
        sinks.append(BackgroundSink(partial(_open_wandb, config.wandb, run_dir, lines), name="wandb"))
    if config.prometheus.port is not None:
        sinks.append(BackgroundSink(partial(_open_prometheus, config.prometheus, run_dir), name="prometheus"))
    sinks.append(make_terminal_sink(terminal))
    return EventStream(run_dir, sinks)


def _open_wandb(config: WandbConfig, run_dir: Path, lines: int) -> Sink:
    from .wandb_sink import WandbSink  # half a second of import, for the runs that use it

    return WandbSink(config, run_dir, lines)


def _open_prometheus(config: PrometheusConfig, run_dir: Path) -> Sink:
    from .prometheus_sink import PrometheusSink  # only runs that are scraped need its library

    return PrometheusSink(config, run_dir)
