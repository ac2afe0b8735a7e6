"""Budget section of a report: cost over steps, and time by category."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ...comm.units import format_gpu_hours, format_percent
from ...trainer.ledger.render import PAPER_TERM_MEANINGS, TERM_MEANINGS
from ...trainer.ledger.summary import LedgerSummary
from ...trainer.ledger.terms import (
    LEDGER_BUCKETS,
    PUBLISHED_GPU_HOURS,
    PUBLISHED_GPU_HOURS_PER_TRILLION_TOKENS,
    PUBLISHED_TOTAL_GPU_HOURS,
    to_gpu_hours,
    to_label,
)
from ..answers.blocks import BarSegment, Block, MissingDataNotice, PageSection, StackedBar, TableBlock, TableRow
from .loss import step_annotations
from .plot import Plot, Series
from .run_record import RunRecord

_STYLES = {
    "productive": "k-good",
    "rolled_back": "k-bad",
    "initialization": "k1",
    "data_stall": "k2",
    "checkpoint_save": "k3",
    "checkpoint_load": "k4",
    "evaluation": "k5",
    "telemetry": "k6",
    "stall": "k-bad",
    "skipped": "k-bad",
    "hang": "k-bad",
    "restart": "k7",
    "idle": "k8",
    "unattributed": "k9",
}
_TERM_STYLES = {
    "F": "f",
    "I": "i",
    "W": "w",
    "B": "b",
    "FB": "fb",
    "exposed_all_to_all": "k3",
    "pipeline_wait": "k5",
    "gradient_sync_wait": "k7",
    "optimizer": "k2",
    "other": "k9",
}


def budget_section(record: RunRecord) -> PageSection:
    """Return the section: burn-down, buckets, terms, and a comparison with DeepSeek-V3."""
    blocks: list[Block] = [*_burn_down(record)]
    if record.summary is None:
        blocks.append(
            MissingDataNotice(
                f"No cost figures: {record.no_summary_reason}", "The launcher and rank 0 of a run write the ledger."
            )
        )
    else:
        blocks += [*_buckets(record.summary), *_terms(record.summary), _comparison(record.summary)]
    return PageSection("budget", "Budget", blocks)


def _burn_down(record: RunRecord) -> Iterator[Block]:
    left, total = record.metric_points("budget_left"), record.total_steps
    if not left or total is None:
        yield MissingDataNotice("No burn-down: no step has logged the budget left.")
        return
    budget = left[0][1]
    if record.summary is not None:  # includes evaluations and waits after the last logged step
        budget = record.summary.budget_gpu_hours
        left.append((left[-1][0], budget - record.summary.gpu_hours))
    step, now = left[-1]
    series = [
        Series("even spending", [(0.0, budget), (float(total), 0.0)], "c5", is_dashed=True),
        Series("left", left, "c1"),
    ]
    projected, spent = record.last_value("projected_gpu_hours"), record.last_value("gpu_hours")
    if step < total and projected is not None and spent is not None:
        series.append(Series("projected", [(step, now), (float(total), now + spent - projected)], "c1", is_dashed=True))
    plot = Plot(
        series,
        height=220,
        y_axis_from_zero=True,
        step_annotations=step_annotations(record),
        format_value=format_gpu_hours,
    )
    note = "Above the dashed line the run spends less than its budget, below it more."
    yield from plot.figures("GPU-hours left of the budget, over optimizer steps", note)


def _buckets(summary: LedgerSummary) -> Iterator[Block]:
    meanings = {
        "productive": f"time in the {summary.steps_retained:,} steps kept",
        "rolled_back": "steps undone by a crash",
        **LEDGER_BUCKETS,
        "unattributed": "time in no other category",
    }
    spent = {
        "productive": summary.productive_ms,
        "rolled_back": summary.rolled_back_ms,
        **summary.gpu_ms_by_bucket,
        "unattributed": summary.unattributed_ms,
    }
    whole = max(1, summary.allocated_ms)
    some = {name: gpu_ms for name, gpu_ms in spent.items() if gpu_ms}
    yield _bar("Where the time went", some, whole, _STYLES)
    lines = [_line(name, some[name], whole, meanings[name], _STYLES[name]) for name in some]
    attempts = "1 attempt" if summary.num_attempts == 1 else f"{summary.num_attempts} attempts"
    total = TableRow(
        ("allocated", format_gpu_hours(to_gpu_hours(summary.allocated_ms)), "100 %", f"total of {attempts}"),
        is_total=True,
    )
    nothing = ", ".join(to_label(name) for name in spent if name not in some)
    note = f"No time: {nothing}." if nothing else ""
    if summary.inherited_ms:
        inherited = format_gpu_hours(to_gpu_hours(summary.inherited_ms))
        note += f" {inherited} GPU-hours more are inherited from the initial checkpoint."
    yield _table([*lines, total], note)


def _terms(summary: LedgerSummary) -> Iterator[Block]:
    if not summary.gpu_ms_by_term:
        hint = "A run samples step 2 and every telemetry.terms_every steps."
        yield MissingDataNotice("No step time breakdown: no step was sampled.", hint)
        return
    whole = max(1, summary.productive_ms)
    some = {name: gpu_ms for name, gpu_ms in summary.gpu_ms_by_term.items() if gpu_ms}
    yield _bar("Where a step goes", some, whole, _TERM_STYLES)
    lines = [_line(name, some[name], whole, TERM_MEANINGS[name], _TERM_STYLES[name]) for name in some]
    samples = "1 step" if summary.sampled_steps == 1 else f"{summary.sampled_steps} steps"
    yield _table(lines, f"Share of productive time, from {samples} sampled on all ranks.")
    meanings = TERM_MEANINGS | PAPER_TERM_MEANINGS
    view = [
        _line(name, gpu_ms, whole, meanings[name], "")
        for name, gpu_ms in summary.gpu_ms_by_paper_term.items()
        if gpu_ms
    ]
    yield _table(view, "", title="In the terms of the DeepSeek-V3 report", is_folded=True)


def _comparison(summary: LedgerSummary) -> TableBlock:
    rate = summary.gpu_hours_per_trillion_tokens
    lines = [
        (
            "per trillion tokens",
            "–" if rate is None else f"{rate:,.0f}",
            f"{PUBLISHED_GPU_HOURS_PER_TRILLION_TOKENS:,}",
            "–" if rate is None else _ratio(rate / PUBLISHED_GPU_HOURS_PER_TRILLION_TOKENS),
        )
    ]
    for phase, published in PUBLISHED_GPU_HOURS.items():
        spent = to_gpu_hours(
            summary.gpu_ms_by_phase.get(phase, 0) + (summary.inherited_ms if phase == summary.phase else 0)
        )
        if spent:
            lines.append((to_label(phase), format_gpu_hours(spent), f"{published:,}", _ratio(spent / published)))
    whole = PUBLISHED_TOTAL_GPU_HOURS
    lines.append(("total", format_gpu_hours(summary.gpu_hours), f"{whole:,}", _ratio(summary.gpu_hours / whole)))
    heads, title = ("GPU-hours", "this run", "DeepSeek-V3", "ratio"), "Compared with DeepSeek-V3 on H800"
    return TableBlock(heads, [TableRow(cells) for cells in lines], title)


def _ratio(share: float) -> str:
    return format_percent(share) if share < 10 else f"{share:,.0f} times"


def _bar(title: str, spent: Mapping[str, int], whole: int, styles: Mapping[str, str]) -> StackedBar:
    return StackedBar(
        title, [BarSegment(to_label(name), gpu_ms / whole, styles[name]) for name, gpu_ms in spent.items()]
    )


def _line(name: str, gpu_ms: int, whole: int, meaning: str, style: str) -> TableRow:
    return TableRow(
        (to_label(name), format_gpu_hours(to_gpu_hours(gpu_ms)), format_percent(gpu_ms / whole), meaning), style
    )


def _table(lines: list[TableRow], note: str, *, title: str = "", is_folded: bool = False) -> TableBlock:
    heads = ("category", "GPU-hours", "share", "meaning")
    return TableBlock(heads, lines, title, note, is_folded)
