"""Recorded data of a run, as a report shows it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from ...comm.errors import ConfigError, Problem, UnsupportedFormatConfigError
from ...comm.files.file_io import config_error_context
from ...comm.files.strict_yaml import read_yaml
from ...trainer.ledger.summary import LedgerSummary, summarize_ledger
from ...trainer.ledger.terms import WORK_FILE
from ...trainer.telemetry.downsample import read_downsampled_metrics
from ...trainer.telemetry.events import METRICS_FILE, Event, RunStarted, StepLogged
from ..run.run_dir import CONFIG_FILE, is_run_dir

Point = tuple[float, float]
E = TypeVar("E", bound=Event)


@dataclass(frozen=True)
class RunRecord:
    """Recorded data of a run at this time."""

    run_dir: Path
    events: Sequence[Event]
    """Events in order, without undone ones; a sample for a long run (`trainer/telemetry/downsample.py`)."""
    config: Mapping[str, Any]
    """Configuration of the last attempt, as a tree of plain values; empty if none is recorded."""
    summary: LedgerSummary | None
    """Ledger summary; None if the ledger is missing or damaged."""
    no_summary_reason: str
    """Why `summary` is None."""

    @cached_property
    def step_events(self) -> list[StepLogged]:
        """Logged steps."""
        return self.events_of(StepLogged)

    def events_of(self, cls: type[E]) -> list[E]:
        """Return the events of one kind."""
        return [event for event in self.events if isinstance(event, cls)]

    def last_event(self, cls: type[E]) -> E | None:
        """Return the last event of a kind, or None."""
        return next((event for event in reversed(self.events) if isinstance(event, cls)), None)

    def step_points(self, read: Callable[[StepLogged], float | None]) -> list[Point]:
        """Return (step, value) of the logged steps that have the value; it may be NaN or infinite."""
        return [(event.step, value) for event in self.step_events if (value := read(event)) is not None]

    def config_value(self, key: str) -> Any:
        """Return the configured value of a dotted key, or None if it is not recorded."""
        tree: Any = self.config
        for name in key.split("."):
            tree = tree.get(name) if isinstance(tree, Mapping) else None
        return tree

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run, or None if not recorded."""
        last = self.last_event(StepLogged) or self.last_event(RunStarted)
        return last.total_steps or None if last is not None else None


def read_run_record(run_dir: Path) -> RunRecord:
    """Read the directory of a run.

    Raises `ConfigError` for any other directory, a damaged metrics line, and metrics or a ledger of another format.
    """
    require_run_dir(run_dir)
    metrics = run_dir / METRICS_FILE
    events = read_downsampled_metrics(metrics) if metrics.exists() else []
    summary, reason = _read_summary(run_dir)
    return RunRecord(run_dir, events, _config(run_dir, events), summary, reason)


def _read_summary(run_dir: Path) -> tuple[LedgerSummary | None, str]:
    """Return the ledger's summary, or the reason why there is none: the report shows the rest all the same."""
    if not (run_dir / WORK_FILE).parent.exists():
        return None, "there is no ledger yet."
    try:
        return summarize_ledger(run_dir), ""
    except UnsupportedFormatConfigError:
        raise
    except ConfigError as refused:
        return None, f"{refused}."


def require_run_dir(run_dir: Path) -> None:
    """Raise `ConfigError` unless `run_dir` is the directory of a run."""
    if not run_dir.is_dir():
        raise ConfigError([Problem("RUN", str(run_dir), "is not a directory; name the training.run_dir of a run")])
    if not is_run_dir(run_dir) and not (run_dir / METRICS_FILE).exists():
        hint = f"is not a run directory (no {METRICS_FILE}, no run marker); name the training.run_dir of a run"
        raise ConfigError([Problem("RUN", str(run_dir), hint)])


def _config(run_dir: Path, events: Sequence[Event]) -> Mapping[str, Any]:
    """Return the configuration that rank 0 logged, else the one that the launcher wrote."""
    logged = [event.config for event in events if isinstance(event, RunStarted)]
    if logged:
        tree: Any = logged[-1]
    else:
        path = run_dir / CONFIG_FILE
        with config_error_context(path, "restore it, or remove it"):  # unresolved: a report must not show secrets
            tree = read_yaml(path, resolve=False) if path.exists() else {}
    return tree if isinstance(tree, Mapping) else {}
