"""How a run tells what it does."""

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
        """What is impossible about these values on their own."""
        if self.mode not in _WANDB_MODES:
            yield Problem("mode", self.mode, f"must be one of {', '.join(_WANDB_MODES)}")
        if not self.project:
            yield Problem("project", self.project, "must not be empty")


@dataclass(frozen=True, kw_only=True)
class PrometheusConfig:
    """Figures for a Prometheus to scrape, served by rank 0."""

    port: int | None = None
    """TCP port of `/metrics`; null for none."""
    address: str = "127.0.0.1"
    """Where to listen: this machine alone, or 0.0.0.0 for a Prometheus elsewhere. Whoever can reach it can read it."""

    def problems(self) -> Iterator[Problem]:
        """What is impossible about these values on their own."""
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
    """Optimizer steps from one look at where the time of a step goes, for the ledger, to the next."""
    trace: bool = False
    """Whether to record a timeline of some steps: run_dir/trace/trace.json, for ui.perfetto.dev."""
    trace_steps: int = 2
    """How many steps, from the second of the launch."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""
    prometheus: PrometheusConfig = field(default_factory=PrometheusConfig)
    """Figures to scrape."""

    def problems(self) -> Iterator[Problem]:
        """What is impossible about these values on their own."""
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
