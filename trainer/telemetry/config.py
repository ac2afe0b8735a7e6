"""Configuration of logging."""

from dataclasses import dataclass, field

from ...comm.files.ranges import CheckedConfig, at_least, between, not_empty, one_of


@dataclass(frozen=True, kw_only=True)
class WandbConfig(CheckedConfig):
    """Weights & Biases. Offline needs neither an account nor a network; `wandb sync` uploads such a run later."""

    mode: str = one_of(("offline", "online", "disabled"), "offline")
    """`offline`, `online` (needs an account) or `disabled`."""
    project: str = not_empty("shoestring")
    """Project that the run belongs to."""
    entity: str | None = None
    """User or team that owns the project; null for the account's default."""
    name: str | None = None
    """Name of the run in plots; null for the name of its directory."""


@dataclass(frozen=True, kw_only=True)
class PrometheusConfig(CheckedConfig):
    """Metrics endpoint for Prometheus, served by rank 0."""

    port: int | None = between(1, 65535, None, null="for none")
    """TCP port of `/metrics`; null for none."""
    address: str = not_empty("127.0.0.1", "must not be empty; 0.0.0.0 is every address of the machine")
    """Address to listen on: the default is this machine only; 0.0.0.0 lets any machine read the metrics."""


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig(CheckedConfig):
    """`metrics.jsonl` and the terminal always; wandb and Prometheus as configured."""

    log_every: int = at_least(1, 10)
    """Optimizer steps from one `step` event to the next."""
    terms_every: int = at_least(1, 50)
    """Optimizer steps from one sampled step, whose time the ledger splits into terms, to the next."""
    trace: bool = False
    """Record a timeline of some steps: run_dir/trace/trace.json, for ui.perfetto.dev."""
    trace_steps: int = at_least(1, 2)
    """Number of traced steps, from the second step of the launch."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""
    prometheus: PrometheusConfig = field(default_factory=PrometheusConfig)
    """Prometheus endpoint."""
