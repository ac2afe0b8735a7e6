"""Cost of a run as figures and blocks, for `shoestring budget` and the report: buckets, terms, DeepSeek-V3."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...comm.units import format_gpu_hours, format_percent, format_usd
from ...trainer.ledger.summary import LedgerSummary
from ...trainer.ledger.terms import (
    LEDGER_BUCKETS,
    PAPER_TERM_MEANINGS,
    PUBLISHED_GPU_HOURS,
    PUBLISHED_GPU_HOURS_PER_TRILLION_TOKENS,
    PUBLISHED_TOTAL_GPU_HOURS,
    PUBLISHED_USD_PER_GPU_HOUR,
    TERM_MEANINGS,
    to_gpu_hours,
    to_label,
)
from ..answers.blocks import (
    BarSegment,
    Block,
    Formats,
    HeadlineCard,
    MissingDataNotice,
    Quantity,
    StackedBar,
    TableBlock,
    TableRow,
    records_table,
    table,
)
from .loss import step_annotations
from .plot import Plot, Series
from .run_record import RunRecord

_BUCKET_STYLES = {
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


def budget_section(record: RunRecord) -> Iterator[Block]:
    """Yield the burn-down and the blocks of the cost."""
    yield from _burn_down(record)
    if record.summary is None:
        hint = "The launcher and rank 0 of a run write the ledger."
        yield MissingDataNotice(f"No cost figures: {record.no_summary_reason}", hint)
    else:
        yield from cost_blocks(record.summary)


def _burn_down(record: RunRecord) -> Iterator[Block]:
    left, total = record.step_points(lambda step: step.budget_left), record.total_steps
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
    projected = record.step_points(lambda step: step.projected_gpu_hours)
    if step < total and projected:
        end = (float(total), now + record.step_events[-1].gpu_hours - projected[-1][1])
        series.append(Series("projected", [(step, now), end], "c1", is_dashed=True))
    plot = Plot(
        series,
        height=220,
        y_axis_from_zero=True,
        step_annotations=step_annotations(record),
        format_value=format_gpu_hours,
    )
    note = "Above the dashed line the run spends less than its budget, below it more."
    yield from plot.figures("GPU-hours left of the budget, over optimizer steps", note)


def cost_cards(summary: LedgerSummary, usd_per_gpu_hour: float = PUBLISHED_USD_PER_GPU_HOUR) -> Iterator[HeadlineCard]:
    """Yield the main figures of a run's cost."""
    share = f"{format_percent(summary.budget_share)} of the budget of {format_gpu_hours(summary.budget_gpu_hours)}"
    spent, logging = summary.gpu_hours, format_percent(summary.telemetry_share)
    yield HeadlineCard("GPU-hours", format_gpu_hours(spent), "", f"{share}; {format_usd(spent, usd_per_gpu_hour)}")
    yield rate_card(summary.gpu_hours_per_trillion_tokens)
    note = f"share of allocated time spent on kept steps; logging took {logging} of step time"
    yield HeadlineCard("goodput", format_percent(summary.goodput), "", note)


def rate_card(gpu_hours_per_trillion_tokens: float | None) -> HeadlineCard:
    """Return the card of the cost per retained token, with the published one."""
    rate = gpu_hours_per_trillion_tokens
    published = f"DeepSeek-V3: {PUBLISHED_GPU_HOURS_PER_TRILLION_TOKENS:,}"
    return HeadlineCard("GPU-hours per trillion tokens", "–" if rate is None else f"{rate:,.0f}", "", published)


def cost_as_dict(summary: LedgerSummary) -> dict[str, Any]:
    """Return the ledger's figures, and the shares and ratios that `cost_blocks` shows, as plain values."""
    allocated, productive = max(1, summary.allocated_ms), max(1, summary.productive_ms)
    return summary.to_json() | {
        "shares": {name: gpu_ms / allocated for name, gpu_ms in spent_by_bucket(summary).items()},
        "term_shares": {name: gpu_ms / productive for name, gpu_ms in summary.gpu_ms_by_term.items()},
        "report_term_shares": {name: gpu_ms / productive for name, gpu_ms in summary.gpu_ms_by_paper_term.items()},
        "published": _published_figures(summary),
    }


def cost_blocks(summary: LedgerSummary) -> Iterator[Block]:
    """Yield allocated time by bucket, productive time by term, and the comparison with DeepSeek-V3."""
    yield from _buckets(summary)
    yield from _terms(summary)
    yield published_table(_published_figures(summary))


def spent_by_bucket(summary: LedgerSummary) -> dict[str, int]:
    """Return the GPU-milliseconds of every bucket; the sum is the allocated time."""
    return {
        "productive": summary.productive_ms,
        "rolled_back": summary.rolled_back_ms,
        **summary.gpu_ms_by_bucket,
        "unattributed": summary.unattributed_ms,
    }


def _buckets(summary: LedgerSummary) -> Iterator[Block]:
    spent, whole = spent_by_bucket(summary), max(1, summary.allocated_ms)
    meanings = {
        "productive": f"time in the {plural(summary.steps_retained, 'step')} kept",
        "rolled_back": "steps undone by a crash",
        **LEDGER_BUCKETS,
        "unattributed": "covered by no record",
    }
    yield _bar("Where the time went", spent, whole, _BUCKET_STYLES)
    attempts = [plural(summary.num_attempts, "attempt")]
    if summary.segments > summary.num_attempts:
        attempts.append(f"{summary.segments} segments")
    state = "running as of its last heartbeat" if summary.is_running else "closed"
    sums = [("allocated", _hours(summary.allocated_ms), "", f"total of {', '.join(attempts)}, the last {state}")]
    if summary.inherited_ms:
        inherited = _hours(summary.inherited_ms)
        sums.append(("inherited", inherited, "", "cost of the checkpoint that it started from"))
        total = Quantity(summary.gpu_hours, format_gpu_hours(summary.gpu_hours))
        sums.append(("total", total, "", "allocated plus inherited"))
    nothing = ", ".join(to_label(name) for name, gpu_ms in spent.items() if not gpu_ms)
    note = "One rank is one GPU, also on CPU." + (f" No time: {nothing}." if nothing else "")
    lines = _lines(spent, whole, meanings, _BUCKET_STYLES)
    yield table(
        f"Phase: {to_label(summary.phase)}", _HEADINGS, [*lines, *(TableRow(cells, "", True) for cells in sums)], note
    )


def _terms(summary: LedgerSummary) -> Iterator[Block]:
    if not summary.gpu_ms_by_term:
        hint = "A run samples step 2 and every telemetry.terms_every steps."
        yield MissingDataNotice("No step time breakdown: no step was sampled.", hint)
        return
    whole = max(1, summary.productive_ms)
    yield _bar("Where a step goes", summary.gpu_ms_by_term, whole, _TERM_STYLES)
    note = f"Share of productive time. From {plural(summary.sampled_steps, 'step')} sampled on all ranks."
    yield table("", _HEADINGS, _lines(summary.gpu_ms_by_term, whole, TERM_MEANINGS, _TERM_STYLES), note)
    lines = _lines(summary.gpu_ms_by_paper_term, whole, PAPER_TERM_MEANINGS, {})
    yield TableBlock(_HEADINGS, lines, "The same by the terms of arXiv 2505.09343", is_collapsed=True)


_HEADINGS = ("spent on", "GPU-hours", "share", "meaning")


def _lines(
    spent: Mapping[str, int], whole: int, meanings: Mapping[str, str], styles: Mapping[str, str]
) -> list[TableRow]:
    return [
        TableRow(
            (to_label(name), _hours(gpu_ms), Quantity(gpu_ms / whole, format_percent(gpu_ms / whole)), meanings[name]),
            styles.get(name, ""),
        )
        for name, gpu_ms in spent.items()
        if gpu_ms
    ]


def _hours(gpu_ms: int) -> Quantity:
    return Quantity(gpu_ms, format_gpu_hours(to_gpu_hours(gpu_ms)))


def _bar(title: str, spent: Mapping[str, int], whole: int, styles: Mapping[str, str]) -> StackedBar:
    some = {name: gpu_ms for name, gpu_ms in spent.items() if gpu_ms}
    return StackedBar(
        title, [BarSegment(to_label(name), gpu_ms / whole, styles[name]) for name, gpu_ms in some.items()]
    )


def published_figures(
    spent: float, spent_by_phase: Mapping[str, float], rate: float | None
) -> list[dict[str, str | float | None]]:
    """Return GPU-hours per trillion retained tokens, of each phase and in all, with DeepSeek-V3's."""
    figures: list[tuple[str, float | None, int]] = [
        ("per trillion retained tokens", rate, PUBLISHED_GPU_HOURS_PER_TRILLION_TOKENS),
        *((phase, spent, PUBLISHED_GPU_HOURS[phase]) for phase, spent in spent_by_phase.items() if spent),
        ("total", spent, PUBLISHED_TOTAL_GPU_HOURS),
    ]
    return [
        {"name": name, "gpu_hours": own, "published": published, "ratio": None if own is None else own / published}
        for name, own, published in figures
    ]


def _published_figures(summary: LedgerSummary) -> list[dict[str, str | float | None]]:
    spent = {phase: to_gpu_hours(gpu_ms) for phase, gpu_ms in summary.gpu_ms_by_phase.items()}
    spent[summary.phase] = spent.get(summary.phase, 0.0) + to_gpu_hours(summary.inherited_ms)
    return published_figures(summary.gpu_hours, spent, summary.gpu_hours_per_trillion_tokens)


def published_table(figures: Sequence[Mapping[str, str | float | None]]) -> TableBlock:
    """Return `published_figures` as a table."""
    headings = {"name": "GPU-hours", "gpu_hours": "this run", "published": "DeepSeek-V3", "ratio": "ratio"}
    formats: Formats = {"name": to_label, "gpu_hours": format_gpu_hours, "ratio": _times}
    return records_table("Compared with DeepSeek-V3 on H800", headings, figures, formats)


def _times(ratio: float) -> str:
    return format_percent(ratio) if ratio < 10 else f"{ratio:,.0f} times"


def plural(count: int, noun: str) -> str:
    """Return the count with its noun: `1 step`, `2 steps`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
