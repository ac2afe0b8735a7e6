"""`shoestring budget --against`: what was planned, what was measured, and the difference, in the ledger's own terms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table

from ...comm.errors import ConfigError, Problem
from ...trainer.config import RunConfig
from ...trainer.ledger.budget_guard import project_gpu_hours
from ...trainer.ledger.render import format_gpu_hours
from ...trainer.ledger.summary import LedgerSummary
from ...trainer.ledger.terms import STEP_TIME_TERMS, to_gpu_hours
from ...trainer.telemetry.events import Event, parse_numbers
from ...trainer.telemetry.history import read_all_metrics
from ...trainer.telemetry.memory_usage import ALLOCATED_LABEL
from ..compose import read_config
from ..planner.plan_file import PlanEntry, read_plan_entry
from ..run.run_dir import CONFIG_FILE

_METRICS_FILE = "metrics.jsonl"
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float64": "fp64"}


@dataclass(frozen=True)
class PlannedVsMeasured:
    """One figure, planned and measured."""

    name: str
    planned: float | None
    measured: float | None
    """None where the run has not recorded it."""

    @property
    def difference(self) -> float | None:
        """Measured less planned."""
        return None if self.planned is None or self.measured is None else self.measured - self.planned


@dataclass(frozen=True)
class PlanComparison:
    """A run beside its plan."""

    layout_name: str
    """Which layout of the plan it is."""
    time_terms: Sequence[PlannedVsMeasured]
    """Seconds a step, mean over ranks; the last ones are `other`, what no term holds."""
    step: PlannedVsMeasured
    """Their sums."""
    totals: Sequence[PlannedVsMeasured]
    """Tokens a second, GPU-hours, bytes."""
    deviations: Sequence[str]
    """Where the run is not what was planned, although its steps are."""
    notes: Sequence[str]
    """Where the measured figures are not of one layout and one size of steps."""


def compare_with_plan(run_dir: Path, summary: LedgerSummary, plan: Path) -> PlanComparison:
    """The run in `run_dir` beside the plan at `plan`.

    Raises `ConfigError` for a run without a step or configuration, and as `read_plan_entry` does.
    """
    config = _configuration(run_dir)
    planned = read_plan_entry(plan, config, _precision(run_dir, config))
    if not summary.steps_retained:
        raise ConfigError([Problem("--against", str(plan), f"{run_dir} has no step to compare yet")])
    steps, ranks = summary.steps_retained, config.topology.world_size
    seconds = summary.productive_ms / 1e3 / ranks
    tokens = sum(summary.tokens_by_phase.values())
    terms = [
        PlannedVsMeasured(term, planned.time_terms[term], _a_step(summary, term, ranks)) for term in STEP_TIME_TERMS
    ]
    return PlanComparison(
        layout_name=planned.layout_name,
        time_terms=[*terms, PlannedVsMeasured("other", 0.0, _a_step(summary, "other", ranks))],
        step=PlannedVsMeasured("step", planned.step_seconds, seconds / steps),
        totals=[
            PlannedVsMeasured("tokens_per_second", planned.tokens_per_second, tokens / seconds),
            *_costs(config, summary, planned),
            PlannedVsMeasured("memory_bytes", planned.memory_bytes, _allocated(run_dir)),
        ],
        deviations=planned.deviations,
        notes=list(_notes(config, summary, tokens)),
    )


def _a_step(summary: LedgerSummary, term: str, ranks: int) -> float | None:
    if not summary.gpu_ms_by_term:
        return None
    return summary.gpu_ms_by_term[term] / 1e3 / ranks / summary.steps_retained


def _costs(config: RunConfig, summary: LedgerSummary, planned: PlanEntry) -> Iterator[PlannedVsMeasured]:
    left = config.tokens_after(config.total_steps) - summary.tokens_retained
    assert summary.step_ms_per_token is not None
    ahead = project_gpu_hours(0.0, left, summary.step_ms_per_token)
    yield PlannedVsMeasured("gpu_hours_of_steps", planned.gpu_hours, to_gpu_hours(summary.productive_ms) + ahead)
    yield PlannedVsMeasured("gpu_hours", None, summary.gpu_hours + ahead)


def _allocated(run_dir: Path) -> float | None:
    """Bytes at the worst moment of the fullest rank; None for a run on a CPU, whose figures hold Python too."""
    looks = [event.values for event in _events(run_dir, "memory") if event.values.get("of") == ALLOCATED_LABEL]
    return max((peak for look in looks for peak in parse_numbers(look.get("peak"))), default=None)


def _notes(config: RunConfig, summary: LedgerSummary, tokens: int) -> Iterator[str]:
    ranks = config.topology.world_size
    others = sorted({held.ranks for held in summary.attempt_usages} - {ranks})
    if others:
        yield f"launches on {', '.join(map(str, others))} ranks are in the measured figures, which count {ranks}"
    full = config.training.global_batch_size * config.training.sequence_length
    if tokens != summary.steps_retained * full:
        yield f"a step took {tokens / summary.steps_retained:,.0f} tokens in the mean, and is planned with {full:,}"
    if summary.inherited_ms:
        yield "what its checkpoint had cost before is in the run's GPU-hours, and not in those of its steps"


def _configuration(run_dir: Path) -> RunConfig:
    """What the last launch was told."""
    return read_config(run_dir / CONFIG_FILE)


def _precision(run_dir: Path, config: RunConfig) -> str | None:
    """Of the GEMMs, in the planner's words; None where nothing says so."""
    if config.precision.linear == "fp8":
        return "fp8"
    dtype = config.precision.compute
    if dtype == "auto":  # what the device has made of it
        told = [str(event.values.get("compute_dtype")) for event in _events(run_dir, "run")]
        dtype = told[-1] if told else dtype
    return _PRECISIONS.get(dtype)


def _events(run_dir: Path, kind: str) -> list[Event]:
    path = run_dir / _METRICS_FILE
    return [event for event in read_all_metrics(path) if event.kind == kind] if path.exists() else []


def comparison_as_dict(comparison: PlanComparison) -> dict[str, object]:
    """Plain values: seconds, tokens a second, GPU-hours and bytes."""

    def line(each: PlannedVsMeasured) -> dict[str, object]:
        return asdict(each) | {"difference": each.difference}

    return {
        "layout": comparison.layout_name,
        "terms_seconds_a_step": [line(each) for each in comparison.time_terms],
        "step_seconds": line(comparison.step),
        "totals": [line(each) for each in comparison.totals],
        "deviations": list(comparison.deviations),
        "notes": list(comparison.notes),
    }


def comparison_table(comparison: PlanComparison) -> RenderableType:
    """The same for a person."""
    longest = max(comparison.step.planned or 0.0, comparison.step.measured or 0.0)
    scale, unit = (1.0, "s") if longest >= 1 else (1e3, "ms")
    table = Table(
        title=f"planned and measured: {comparison.layout_name}",
        caption=f"Terms in {unit} a step, mean over ranks. GPU-hours at the run's end: a plan's are of "
        "steps alone, all are also start-up, checkpoints and the like.",
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("", "planned", "measured", "difference", "of the plan"):
        table.add_column(heading, justify="right" if heading else "left")
    for each in (*comparison.time_terms, comparison.step):
        figures = _figures(each, lambda figure: f"{figure * scale:.4f}")
        is_last = each in (comparison.time_terms[-1], comparison.step)
        table.add_row(each.name.replace("_", " "), *figures, _share(each, least=longest / 1e5), end_section=is_last)
    for each in comparison.totals:
        name, show = _TOTALS[each.name]
        table.add_row(name, *_figures(each, show), _share(each))
    lines = [f"{note[0].upper()}{note[1:]}." for note in comparison.notes]
    if comparison.deviations:
        lines.insert(0, f"Not as planned: {'; '.join(comparison.deviations)}.")
    return Group(table, *lines)


_TOTALS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "tokens_per_second": ("tokens a second", lambda figure: f"{figure:,.0f}"),
    "gpu_hours_of_steps": ("GPU-hours of steps", format_gpu_hours),
    "gpu_hours": ("GPU-hours of all", format_gpu_hours),
    "memory_bytes": ("GB of the fullest rank", lambda figure: f"{figure / 1e9:.2f}"),
}


def _figures(each: PlannedVsMeasured, show: Callable[[float], str]) -> list[str]:
    """Planned, measured, and the difference with its sign."""
    sign = "+" if each.difference is not None and each.difference >= 0 else ""
    planned = "-" if each.planned is None else show(each.planned)
    measured = "not recorded" if each.measured is None else show(each.measured)
    return [planned, measured, "-" if each.difference is None else f"{sign}{show(each.difference)}"]


def _share(each: PlannedVsMeasured, least: float = 0.0) -> str:
    """The difference, of what was planned; the ratio where that says more. Nothing of a plan up to `least`."""
    if each.planned is None or each.planned <= least or each.measured is None:
        return ""
    ratio = each.measured / each.planned
    return f"x {ratio:,.0f}" if ratio >= 10 else f"{ratio - 1:+.1%}"
