"""Everything that a run has left behind and a report tells of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...comm.errors import ConfigError, Problem
from ...comm.files.file_io import config_error_context
from ...comm.files.strict_yaml import read_yaml
from ...trainer.ledger.summary import LedgerSummary, summarize_ledger
from ...trainer.ledger.terms import WORK_FILE
from ...trainer.telemetry.downsample import read_downsampled_metrics
from ...trainer.telemetry.events import METRICS_FILE, Event, parse_number
from ..run.run_dir import CONFIG_FILE, is_run_dir

Point = tuple[float, float]
_MOST_STEPS = 2**53


@dataclass(frozen=True)
class RunRecord:
    """A run, as of now."""

    run_dir: Path
    events: Sequence[Event]
    """That still hold, in order; of a long run a sample (see `telemetry/sampled.py`)."""
    config: Mapping[str, Any]
    """Of the last launch, as a tree of plain values; empty where none is recorded."""
    summary: LedgerSummary | None
    """What it has cost; None where its ledger does not say."""
    no_summary_reason: str
    """Why there is none."""

    @cached_property
    def step_events(self) -> list[Event]:
        """The `step` events."""
        return self.events_of_kind("step")

    def events_of_kind(self, kind: str) -> list[Event]:
        """The events of one kind."""
        return [event for event in self.events if event.kind == kind]

    def last_event(self, kind: str) -> Event | None:
        """The last event of a kind."""
        found = self.events_of_kind(kind)
        return found[-1] if found else None

    def metric_points(self, key: str, kind: str = "step") -> list[Point]:
        """(step, value) of a number in the events of a kind; it may be not finite."""
        return [
            (event.step, value)
            for event in self.events_of_kind(kind)
            if (value := parse_number(event.values.get(key))) is not None
        ]

    def last_value(self, key: str, kind: str = "step") -> float | None:
        """The last of these."""
        points = self.metric_points(key, kind)
        return points[-1][1] if points else None

    def config_value(self, key: str) -> Any:
        """The configured value of a dotted key; None where it is not recorded."""
        tree: Any = self.config
        for name in key.split("."):
            tree = tree.get(name) if isinstance(tree, Mapping) else None
        return tree

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run."""
        for kind in ("step", "run"):
            total = self.last_value("total_steps", kind)
            if total is not None and 0 < total < _MOST_STEPS:
                return int(total)
        return None


def read_run_record(run_dir: Path) -> RunRecord:
    """What is in the directory of a run. Raises `ConfigError` for any other place, and for a broken line of metrics."""
    require_run_dir(run_dir)
    metrics = run_dir / METRICS_FILE
    events = read_downsampled_metrics(metrics) if metrics.exists() else []
    summary, no_summary = _bill(run_dir)
    return RunRecord(run_dir, events, _config(run_dir, events), summary, no_summary)


def _bill(run_dir: Path) -> tuple[LedgerSummary | None, str]:
    """What the ledger says, or why it says nothing: a broken one is told in its place, and the rest all the same."""
    if not (run_dir / WORK_FILE).parent.exists():
        return None, "there is no ledger yet."
    try:
        return summarize_ledger(run_dir), ""
    except ConfigError as refused:
        return None, f"{refused}."


def require_run_dir(run_dir: Path) -> None:
    """Raise `ConfigError` unless a run has made `run_dir`."""
    if not run_dir.is_dir():
        raise ConfigError([Problem("RUN", str(run_dir), "is no directory; name that of a run, its training.run_dir")])
    if not is_run_dir(run_dir) and not (run_dir / METRICS_FILE).exists():
        hint = f"holds no run (neither {METRICS_FILE} nor what marks a run's directory); name its training.run_dir"
        raise ConfigError([Problem("RUN", str(run_dir), hint)])


def _config(run_dir: Path, events: Sequence[Event]) -> Mapping[str, Any]:
    """What rank 0 has told; else, where no rank has come so far, what its launcher has written."""
    told = [event.values["config"] for event in events if isinstance(event.values.get("config"), Mapping)]
    if told:
        tree: Any = told[-1]
    else:
        path = run_dir / CONFIG_FILE
        with config_error_context(path, "restore it, or remove it"):  # unresolved: a report shows no secret
            tree = read_yaml(path, resolve=False) if path.exists() else {}
    return tree if isinstance(tree, Mapping) else {}
