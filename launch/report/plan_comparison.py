"""`shoestring budget --against`: planned against measured figures, in the ledger's terms."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ...comm.errors import ConfigError, Problem
from ...comm.units import format_giga, format_gpu_hours
from ...trainer.config import RunConfig
from ...trainer.ledger.budget_guard import project_gpu_hours
from ...trainer.ledger.summary import LedgerSummary
from ...trainer.ledger.terms import STEP_TIME_TERMS, to_gpu_hours, to_label
from ...trainer.telemetry.events import METRICS_FILE, Event, MemoryMeasured, RunStarted
from ...trainer.telemetry.history import read_all_metrics
from ...trainer.telemetry.memory_usage import ALLOCATED_LABEL
from ..answers.blocks import Block, Cell, Paragraph, Quantity, TableRow, table
from ..compose import read_config
from ..planner.plan_file import read_plan_entry
from ..run.run_dir import CONFIG_FILE

E = TypeVar("E", bound=Event)
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float64": "fp64"}


@dataclass(frozen=True)
class PlannedVsMeasured:
    """A figure, planned and measured."""

    name: str
    planned: float | None
    measured: float | None
    """None if the run did not record it."""
    difference: float | None
    """Measured minus planned, or None."""
    relative: float | None
    """Difference divided by the planned figure, or None."""


def _compared(name: str, planned: float | None, measured: float | None) -> PlannedVsMeasured:
    difference = None if planned is None or measured is None else measured - planned
    relative = None if difference is None or not planned else difference / planned
    return PlannedVsMeasured(name, planned, measured, difference, relative)


@dataclass(frozen=True)
class PlanComparison:
    """Comparison of a run with its plan, by the keys of the JSON."""

    layout: str
    """Which layout of the plan it is compared with."""
    terms_seconds_a_step: Sequence[PlannedVsMeasured]
    """Seconds per step, mean over ranks; the last one is `other`, time in no term."""
    step_seconds: PlannedVsMeasured
    """Seconds per step, the sum of the terms."""
    totals: Sequence[PlannedVsMeasured]
    """Tokens/s, GPU-hours and bytes."""
    deviations: Sequence[str]
    """Differences between plan and run that leave the plan comparable, in words."""
    notes: Sequence[str]
    """Why measured figures are not of one layout and batch size, in words."""


def compare_with_plan(run_dir: Path, summary: LedgerSummary, plan: Path) -> PlanComparison:
    """Compare the run in `run_dir` with the plan at `plan`.

    Raises `ConfigError` for a run without a step or configuration, and for a plan of another run.
    """
    config = read_config(run_dir / CONFIG_FILE)  # of the last attempt
    planned = read_plan_entry(plan, config, _precision(run_dir, config))
    if not summary.steps_retained:
        raise ConfigError([Problem("--against", str(plan), f"{run_dir} has no step to compare with yet")])
    steps, ranks = summary.steps_retained, config.topology.world_size
    seconds = summary.productive_ms / 1e3 / ranks
    tokens = sum(summary.tokens_by_phase.values())
    figures, measured = planned.figures, summary.gpu_ms_by_term
    return PlanComparison(
        layout=planned.layout_name,
        terms_seconds_a_step=[
            _compared(term, expected, measured[term] / 1e3 / ranks / steps if measured else None)
            for term, expected in [*((term, figures.time_terms[term]) for term in STEP_TIME_TERMS), ("other", 0.0)]
        ],
        step_seconds=_compared("step", figures.step_seconds, seconds / steps),
        totals=[
            _compared("tokens_per_second", figures.tokens_per_second, tokens / seconds),
            *_costs(config, summary, figures.gpu_hours),
            _compared("memory_bytes", figures.memory_bytes, _allocated(run_dir)),
        ],
        deviations=planned.deviations,
        notes=list(_notes(config, summary, tokens)),
    )


def _costs(config: RunConfig, summary: LedgerSummary, planned_hours: float) -> Iterator[PlannedVsMeasured]:
    tokens_left = config.tokens_after(config.total_steps) - summary.tokens_retained
    assert summary.step_ms_per_token is not None
    ahead = project_gpu_hours(0.0, tokens_left, summary.step_ms_per_token)
    yield _compared("gpu_hours_of_steps", planned_hours, to_gpu_hours(summary.productive_ms) + ahead)
    yield _compared("gpu_hours", None, summary.gpu_hours + ahead)


def _allocated(run_dir: Path) -> float | None:
    """Return the peak bytes of the rank that needs most; None on a CPU, whose figures include the interpreter."""
    samples = [event.peak for event in _events(run_dir, MemoryMeasured) if event.quantity == ALLOCATED_LABEL]
    return max((peak for peaks in samples for peak in peaks), default=None)


def _notes(config: RunConfig, summary: LedgerSummary, tokens: int) -> Iterator[str]:
    ranks = config.topology.world_size
    others = sorted({held.ranks for held in summary.attempt_usages} - {ranks})
    if others:
        yield f"attempts on {', '.join(map(str, others))} ranks are in the measured figures, which assume {ranks}"
    full = config.training.global_batch_size * config.training.sequence_length
    if tokens != summary.steps_retained * full:
        yield f"mean tokens per step {tokens / summary.steps_retained:,.0f}; planned {full:,}"
    if summary.inherited_ms:
        yield "the initial checkpoint's GPU-hours are in the total, not in those of steps"


def _precision(run_dir: Path, config: RunConfig) -> str | None:
    """Return the GEMM precision by the planner's names; None if it is not recorded."""
    if config.precision.linear == "fp8":
        return "fp8"
    dtype = config.precision.compute
    if dtype == "auto":  # resolved on the device, and logged
        logged = [event.compute_dtype for event in _events(run_dir, RunStarted)]
        dtype = logged[-1] if logged else dtype
    return _PRECISIONS.get(dtype)


def _events(run_dir: Path, cls: type[E]) -> list[E]:
    path = run_dir / METRICS_FILE
    return [event for event in read_all_metrics(path) if isinstance(event, cls)] if path.exists() else []


def comparison_blocks(comparison: PlanComparison) -> Iterator[Block]:
    """Yield the comparison as a table, with notes."""
    step = comparison.step_seconds
    longest = max(step.planned or 0.0, step.measured or 0.0)
    scale, unit = (1.0, "s") if longest >= 1 else (1e3, "ms")

    def time_row(each: PlannedVsMeasured, *, is_total: bool = False) -> TableRow:
        cells = _cells(each, lambda seconds: f"{seconds * scale:.4f}", least=longest / 1e5)
        return TableRow((to_label(each.name), *cells), is_total=is_total)

    yield table(
        f"Planned and measured: {comparison.layout}",
        ("", "planned", "measured", "difference", "relative"),
        [
            *map(time_row, comparison.terms_seconds_a_step),
            time_row(step, is_total=True),
            *((name, *_cells(each, show)) for each in comparison.totals for name, show in [_TOTALS[each.name]]),
        ],
        f"Terms in {unit} per step, mean over ranks. GPU-hours at the end of the run: a plan counts "
        "steps only; the total includes start-up, checkpoints and all other time.",
    )
    if comparison.deviations:
        yield Paragraph(f"Not as planned: {'; '.join(comparison.deviations)}.")
    yield from (Paragraph(f"{note[0].upper()}{note[1:]}.") for note in comparison.notes)


_TOTALS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "tokens_per_second": ("tokens/s", lambda figure: f"{figure:,.0f}"),
    "gpu_hours_of_steps": ("GPU-hours, steps only", format_gpu_hours),
    "gpu_hours": ("GPU-hours, total", format_gpu_hours),
    "memory_bytes": ("peak GB per rank", format_giga),
}


def _cells(each: PlannedVsMeasured, show: Callable[[float], str], least: float = 0.0) -> Iterator[Cell]:
    """Yield planned, measured, and the signed and the relative difference, which is empty for a plan below `least`."""
    yield "-" if each.planned is None else Quantity(each.planned, show(each.planned))
    yield "not recorded" if each.measured is None else Quantity(each.measured, show(each.measured))
    if each.difference is None or each.planned is None:
        yield from ("-", "")
        return
    yield Quantity(each.difference, f"{'+' if each.difference >= 0 else ''}{show(each.difference)}")
    if each.relative is None or each.planned <= least:
        yield ""
    else:
        ratio = each.relative + 1
        yield Quantity(each.relative, f"x {ratio:,.0f}" if ratio >= 10 else f"{each.relative:+.1%}")
