"""Configuration of logging."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ...comm.errors import Problem

_WANDB_MODES = ("offline", "online", "disabled")


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases. Offline needs neither an account nor a network; `wandb sync` uploads such a run later."""

    mode: str = "offline"
    """`offline`, `online` (needs an account) or `disabled`."""
    project: str = "shoestring"
    """Project that the run belongs to."""
    entity: str | None = None
    """User or team that owns the project; null for the account's default."""
    name: str | None = None
    """Name of the run in plots; null for the name of its directory."""

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each invalid value."""
        if self.mode not in _WANDB_MODES:
            yield Problem("mode", self.mode, f"must be one of {', '.join(_WANDB_MODES)}")
        if not self.project:
            yield Problem("project", self.project, "must not be empty")


@dataclass(frozen=True, kw_only=True)
class PrometheusConfig:
    """Metrics endpoint for Prometheus, served by rank 0."""

    port: int | None = None
    """TCP port of `/metrics`; null for none."""
    address: str = "127.0.0.1"
    """Address to listen on: the default is this machine only; 0.0.0.0 lets any machine read the metrics."""

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each invalid value."""
        if self.port is not None and not 1 <= self.port <= 65535:
            yield Problem("port", self.port, "must be from 1 to 65535, or null for none")
        if not self.address:
            yield Problem("address", self.address, "must not be empty; 0.0.0.0 is every address of the machine")


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """`metrics.jsonl` and the terminal always; wandb and Prometheus as configured."""

    log_every: int = 10
    """Optimizer steps from one `step` event to the next."""
    terms_every: int = 50
    """Optimizer steps from one sampled step, whose time the ledger splits into terms, to the next."""
    trace: bool = False
    """Record a timeline of some steps: run_dir/trace/trace.json, for ui.perfetto.dev."""
    trace_steps: int = 2
    """Number of traced steps, from the second step of the launch."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""
    prometheus: PrometheusConfig = field(default_factory=PrometheusConfig)
    """Prometheus endpoint."""

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each invalid value."""
        if self.log_every < 1:
            yield Problem("log_every", self.log_every, "must be at least 1")
        if self.terms_every < 1:
            yield Problem("terms_every", self.terms_every, "must be at least 1")
        if self.trace_steps < 1:
            yield Problem("trace_steps", self.trace_steps, "must be at least 1")
        for problem in self.wandb.problems():
            yield problem.with_prefix("wandb")
        for problem in self.prometheus.problems():
            yield problem.with_prefix("prometheus")
