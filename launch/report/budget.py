"""What the run has cost: how its budget went down, and where the time went."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ...trainer.ledger.render import PAPER_TERM_MEANINGS, TERM_MEANINGS, format_gpu_hours, format_percent
from ...trainer.ledger.summary import LedgerSummary
from ...trainer.ledger.terms import (
    LEDGER_BUCKETS,
    PUBLISHED_GPU_HOURS,
    PUBLISHED_GPU_HOURS_PER_TRILLION_TOKENS,
    PUBLISHED_TOTAL_GPU_HOURS,
    to_gpu_hours,
)
from .blocks import BarSegment, Block, Figure, MissingDataNotice, PageSection, StackedBar, TableBlock, TableRow
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
    """Burn-down, buckets, terms, and the published run beside."""
    blocks: list[Block] = [*_burn_down(record)]
    if record.summary is None:
        blocks.append(
            MissingDataNotice(
                f"No bill: {record.no_summary_reason}", "The launcher of a run and its rank 0 keep a ledger."
            )
        )
    else:
        blocks += [*_buckets(record.summary), *_terms(record.summary), _beside(record.summary)]
    return PageSection("budget", "Budget", blocks)


def _burn_down(record: RunRecord) -> Iterator[Block]:
    left, total = record.metric_points("budget_left"), record.total_steps
    if not left or total is None:
        yield MissingDataNotice("No burn-down: no step has told what is left of the budget.", "")
        return
    budget = left[0][1]
    if record.summary is not None:  # which knows of evaluations and waiting after the last step that was told of
        budget = record.summary.budget_gpu_hours
        left.append((left[-1][0], budget - record.summary.gpu_hours))
    step, now = left[-1]
    series = [
        Series("spending evenly", [(0.0, budget), (float(total), 0.0)], "c5", is_dashed=True),
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
    picture = plot.svg()
    if picture is not None:
        note = "Above the dashed line the run costs less than its budget, below it more."
        yield Figure("GPU-hours left of the budget, over optimizer steps", picture, plot.legend(), note)


def _buckets(summary: LedgerSummary) -> Iterator[Block]:
    meanings = {
        "productive": f"{summary.steps_retained:,} steps in the weights",
        "rolled_back": "steps undone by a crash",
        **LEDGER_BUCKETS,
        "unattributed": "charged to nothing",
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
    launches = "1 launch" if summary.num_attempts == 1 else f"{summary.num_attempts} launches"
    total = TableRow(
        ("allocated", format_gpu_hours(to_gpu_hours(summary.allocated_ms)), "100 %", f"all of it, in {launches}"),
        is_total=True,
    )
    nothing = ", ".join(name.replace("_", " ") for name in spent if name not in some)
    note = f"Nothing went to {nothing}." if nothing else ""
    if summary.inherited_ms:
        note += f" {format_gpu_hours(to_gpu_hours(summary.inherited_ms))} GPU-hours more were inherited with the checkpoint."
    yield _table([*lines, total], note)


def _terms(summary: LedgerSummary) -> Iterator[Block]:
    if not summary.gpu_ms_by_term:
        hint = "A run looks closely at its second step and at one in telemetry.terms_every."
        yield MissingDataNotice("What steps are made of is not recorded: no step was looked at closely.", hint)
        return
    whole = max(1, summary.productive_ms)
    some = {name: gpu_ms for name, gpu_ms in summary.gpu_ms_by_term.items() if gpu_ms}
    yield _bar("What steps are made of", some, whole, _TERM_STYLES)
    lines = [_line(name, some[name], whole, TERM_MEANINGS[name], _TERM_STYLES[name]) for name in some]
    looks = "1 step" if summary.sampled_steps == 1 else f"{summary.sampled_steps} steps"
    yield _table(lines, f"Of productive time, from {looks} looked at on all ranks.")
    meanings = TERM_MEANINGS | PAPER_TERM_MEANINGS
    view = [
        _line(name, gpu_ms, whole, meanings[name], "")
        for name, gpu_ms in summary.gpu_ms_by_paper_term.items()
        if gpu_ms
    ]
    yield _table(view, "", title="Under the names of DeepSeek's report", is_folded=True)


def _beside(summary: LedgerSummary) -> TableBlock:
    rate = summary.gpu_hours_per_trillion_tokens
    lines = [
        (
            "a trillion retained tokens",
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
            lines.append(
                (phase.replace("_", " "), format_gpu_hours(spent), f"{published:,}", _ratio(spent / published))
            )
    whole = PUBLISHED_TOTAL_GPU_HOURS
    lines.append(("all", format_gpu_hours(summary.gpu_hours), f"{whole:,}", _ratio(summary.gpu_hours / whole)))
    heads = ("GPU-hours of", "this run", "DeepSeek-V3", "this of that")
    return TableBlock(heads, [TableRow(cells) for cells in lines], frozenset({1, 2, 3}), "Beside DeepSeek-V3, on H800")


def _ratio(share: float) -> str:
    return format_percent(share) if share < 10 else f"{share:,.0f} times"


def _bar(title: str, spent: Mapping[str, int], whole: int, styles: Mapping[str, str]) -> StackedBar:
    return StackedBar(
        title, [BarSegment(name.replace("_", " "), gpu_ms / whole, styles[name]) for name, gpu_ms in spent.items()]
    )


def _line(name: str, gpu_ms: int, whole: int, meaning: str, style: str) -> TableRow:
    return TableRow(
        (name.replace("_", " "), format_gpu_hours(to_gpu_hours(gpu_ms)), format_percent(gpu_ms / whole), meaning), style
    )


def _table(lines: list[TableRow], note: str, *, title: str = "", is_folded: bool = False) -> TableBlock:
    heads = ("spent on", "GPU-hours", "share", "what it is")
    return TableBlock(heads, lines, frozenset({1, 2}), title, note, is_folded)
