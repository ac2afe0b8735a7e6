"""Prometheus endpoint of a run: `http://ADDRESS:PORT/metrics` on the machine of rank 0.

All metrics are gauges, also tokens and GPU-hours: a resume rolls steps back. Unknown values are absent instead of 0.
"""

import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from ...comm.errors import ConfigError, Problem
from .config import PrometheusConfig
from .events import Event, RunResumed, RunStarted, StepLogged, WarningRaised, parse_number

_GAUGES: Mapping[str, Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "step": {
            "loss": ("loss_nats", "Training loss of the last logged step, in nats per token."),
            "loss/mtp": ("mtp_loss_nats", "Loss of multi-token prediction, in nats per token."),
            "loss/seq_aux": ("balance_loss", "Balance loss."),
            "grad_norm": ("gradient_norm", "Norm of the gradient before clipping."),
            "learning_rate": ("learning_rate", "Learning rate."),
            "tokens": ("tokens", "Tokens that the weights have been trained on."),
            "tokens_per_second": ("tokens_per_second", "Tokens/s of all ranks together."),
            "mfu": ("mfu_ratio", "Model FLOPs utilization; 1 is the peak."),
            "gpu_hours": ("gpu_hours", "GPU-hours spent since the first attempt."),
            "budget_left": ("budget_left_gpu_hours", "GPU-hours left in the run's budget."),
            "projected_gpu_hours": ("projected_gpu_hours", "Projected GPU-hours at the end of the run."),
            "goodput": ("goodput_ratio", "Share of allocated GPU time spent on kept steps."),
            "eta_seconds": ("eta_seconds", "Seconds to the end at the rate of the last steps."),
            "total_steps": ("steps_planned", "Optimizer steps of the whole run."),
            "load/max_violation": ("load_max_violation", "Largest expert load divided by the mean, minus 1."),
            "load/ranks/max_violation": ("rank_load_max_violation", "Largest rank load divided by the mean, minus 1."),
        },
        "evaluation": {
            "loss": ("validation_loss_nats", "Validation loss, in nats per token."),
            "loss/averaged": (
                "averaged_validation_loss_nats",
                "Validation loss with averaged weights.",
            ),
        },
    }
)
"""Name and help text of each gauge, by event kind and key."""
_INFO = ("device", "compute_dtype", "linear", "ranks")


def port_problems(config: PrometheusConfig) -> Iterator[Problem]:
    """Yield a problem if this machine cannot listen on the configured port."""
    if config.port is None:
        return
    try:
        family, *_ = socket.getaddrinfo(config.address, config.port, type=socket.SOCK_STREAM)[0]
        socket.create_server((config.address, config.port), family=family).close()
    except OSError as error:
        yield _cannot_listen(config, error)


def _cannot_listen(config: PrometheusConfig, error: OSError) -> Problem:
    hint = f"cannot listen on it at {config.address} ({error.strerror}); name a free port, or null for none"
    return Problem("telemetry.prometheus.port", config.port, hint)


class PrometheusSink(Collector):
    """HTTP server, in a daemon thread, of the last events' values. Raises `ConfigError` if it cannot listen."""

    name = "prometheus"

    def __init__(self, config: PrometheusConfig, run_dir: Path) -> None:
        assert config.port is not None
        self._run = str(run_dir)
        self._info: Mapping[str, str] = {}
        self._gauges: dict[str, tuple[str, float]] = {}
        self._warnings: Counter[str] = Counter()
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(config.port, config.address, registry)
        except OSError as error:
            raise ConfigError([_cannot_listen(config, error)]) from error

    def emit(self, event: Event) -> None:
        """Update the gauges from `event`."""
        gauges = dict(self._gauges)
        if isinstance(event, RunStarted | RunResumed | StepLogged):  # a checkpoint event may come some steps late
            gauges["step"] = "Optimizer steps done.", event.step
        gauges["last_event_timestamp_seconds"] = "Time of the last event, in seconds since the epoch.", event.time
        values = event.values
        for key, (name, text) in _GAUGES.get(event.kind, {}).items():
            value = parse_number(values.get(key))
            if value is not None:
                gauges[name] = text, value
        # A scrape may come at any time: it sees all of this event or nothing.
        self._gauges = gauges
        if isinstance(event, RunStarted):
            self._info = {"run": self._run, **{key: str(values[key]) for key in _INFO}}
        elif isinstance(event, WarningRaised):
            self._warnings[event.about] += 1

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of a scrape."""
        if self._info:
            yield InfoMetricFamily("shoestring_run", "The run.", dict(self._info))
        for name, (text, value) in self._gauges.items():
            yield GaugeMetricFamily(f"shoestring_{name}", text, value)
        warnings = CounterMetricFamily("shoestring_warnings", "Warnings since rank 0 has started.", labels=["about"])
        for about, count in self._warnings.copy().items():
            warnings.add_metric([about], count)
        yield warnings

    def close(self) -> None:
        """Stop the server and release the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
