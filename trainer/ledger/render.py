"""Tables of a run's or project's cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table

from ...comm.units import format_gpu_hours, format_percent, format_si, format_usd
from .project import Project, ProjectTotals
from .summary import LedgerSummary
from .terms import (
    LEDGER_BUCKETS,
    PUBLISHED_GPU_HOURS,
    PUBLISHED_GPU_HOURS_PER_TRILLION_TOKENS,
    PUBLISHED_TOTAL_GPU_HOURS,
    PUBLISHED_USD_PER_GPU_HOUR,
    to_gpu_hours,
    to_label,
)

TERM_MEANINGS = {
    "F": "forward",
    "I": "gradients of inputs",
    "W": "gradients of weights",
    "B": "whole backward",
    "FB": "forward and backward, overlapped",
    "exposed_all_to_all": "waiting for the tokens of an all-to-all",
    "pipeline_wait": "waiting for a pipeline neighbor",
    "gradient_sync_wait": "waiting for reductions over ranks",
    "optimizer": "weight update",
    "other": "the rest of the step",
}
PAPER_TERM_MEANINGS = {
    "1F": "F",
    "bubble": "pipeline wait of the ideal schedule (derived)",
    "imbalance": "the rest of pipeline wait (derived)",
    "1B": "I and B",
    "1W": "W",
    "1F1B": "FB",
    "opt": "optimizer",
}

_RATE_LABELS = {
    "its last steps, their median": "the last steps (median)",
    "everything it was charged": "the whole run",
}
"""Labels of the keys of `what_if_gpu_hours`."""


def render_ledger(summary: LedgerSummary, usd_per_gpu_hour: float = PUBLISHED_USD_PER_GPU_HOUR) -> RenderableType:
    """Return tables of `summary`: time by bucket, productive time by term, and the comparison with the budgets."""
    parts = [_spending(summary), *_productive(summary), _comparison(summary, usd_per_gpu_hour)]
    return Group(*parts)


def _spending(summary: LedgerSummary) -> Table:
    state = "running as of its last heartbeat" if summary.is_running else "closed"
    parts = [_plural(summary.num_attempts, "attempt", "attempts")]
    if summary.segments > summary.num_attempts:
        parts.append(f"{summary.segments} segments")
    table = _table(f"{summary.phase}: {', '.join(parts)}, the last {state}", "One rank is one GPU, also on CPU.")

    def row(name: str, milliseconds: int, meaning: str) -> None:
        share = format_percent(milliseconds / summary.allocated_ms) if summary.allocated_ms else "-"
        table.add_row(to_label(name), format_gpu_hours(to_gpu_hours(milliseconds)), share, meaning)

    row("productive", summary.productive_ms, f"time in the {_plural(summary.steps_retained, 'step', 'steps')} kept")
    row("rolled_back", summary.rolled_back_ms, "steps undone by a crash")
    for bucket, milliseconds in summary.gpu_ms_by_bucket.items():
        row(bucket, milliseconds, LEDGER_BUCKETS[bucket])
    row("unattributed", summary.unattributed_ms, "covered by no record")
    table.add_section()
    row("allocated", summary.allocated_ms, "all of the above")
    if summary.inherited_ms:
        inherited = format_gpu_hours(to_gpu_hours(summary.inherited_ms))
        table.add_row("inherited", inherited, "", "cost of the checkpoint that it started from")
        table.add_row("total", format_gpu_hours(summary.gpu_hours), "", "allocated plus inherited")
    return table


def _productive(summary: LedgerSummary) -> Iterator[Table]:
    """Yield productive time by the ledger's terms and by those of arXiv 2505.09343."""
    if not summary.gpu_ms_by_term:
        return
    sampled = _plural(summary.sampled_steps, "step", "steps")
    paper_meanings = TERM_MEANINGS | PAPER_TERM_MEANINGS
    views = (
        ("productive time", summary.gpu_ms_by_term, TERM_MEANINGS, f"From {sampled} sampled on all ranks."),
        (
            "the same by the terms of arXiv 2505.09343",
            summary.gpu_ms_by_paper_term,
            paper_meanings,
            None,
        ),
    )
    for title, parts, meanings, caption in views:
        table = _table(title, caption)
        for name, milliseconds in parts.items():
            share = format_percent(milliseconds / max(1, summary.productive_ms))
            shown = name if name in PAPER_TERM_MEANINGS else to_label(name)
            table.add_row(shown, format_gpu_hours(to_gpu_hours(milliseconds)), share, meanings[name])
        yield table


def _table(title: str, caption: str | None) -> Table:
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column("spent on")
    table.add_column("GPU-hours", justify="right")
    table.add_column("share", justify="right")
    table.add_column("meaning")
    return table


def _plain() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    return table


def _comparison(summary: LedgerSummary, usd_per_gpu_hour: float) -> Table:
    table = _plain()
    spent, rate = summary.gpu_hours, summary.gpu_hours_per_trillion_tokens
    table.add_row("cost", f"{format_gpu_hours(spent)} GPU-hours", format_usd(spent, usd_per_gpu_hour))
    table.add_row("goodput", format_percent(summary.goodput), "share of allocated time spent on kept steps")
    table.add_row("logging", format_percent(summary.telemetry_share), "of step time")
    table.add_row(
        "this run's budget",
        format_percent(summary.budget_share),
        f"of {format_gpu_hours(summary.budget_gpu_hours)} GPU-hours",
    )
    table.add_row("tokens retained", f"{summary.tokens_retained:,}", f"of {summary.tokens_consumed:,} consumed")
    _add_headline(table, rate)
    for phase, spent_ms in summary.gpu_ms_by_phase.items():
        _add_phase(
            table, phase, to_gpu_hours(spent_ms) + (to_gpu_hours(summary.inherited_ms) if phase == summary.phase else 0)
        )
    _add_whole(table, spent)
    return table


def _add_headline(table: Table, rate: float | None) -> None:
    shown = "-" if rate is None else f"{rate:,.0f}"
    published = f"DeepSeek-V3 on H800: {PUBLISHED_GPU_HOURS_PER_TRILLION_TOKENS:,}"
    table.add_row("GPU-hours per trillion retained tokens", shown, published)


def _add_phase(table: Table, phase: str, spent: float) -> None:
    published = PUBLISHED_GPU_HOURS[phase]
    table.add_row(
        f"DeepSeek-V3's {to_label(phase)}", format_percent(spent / published), f"of {published:,} H800 GPU-hours"
    )


def _add_whole(table: Table, spent: float) -> None:
    whole = PUBLISHED_TOTAL_GPU_HOURS
    table.add_row("DeepSeek-V3 in total", format_percent(spent / whole), f"of {whole:,} GPU-hours")


def render_what_if(summary: LedgerSummary, tokens: float, gpus: int, usd_per_gpu_hour: float) -> RenderableType:
    """Return a table of the cost of `tokens` on `gpus` at this run's rate: of its last steps, and of the whole run.

    The rate holds for this model on this hardware only.
    """
    table = Table(
        title=f"{format_si(tokens)} tokens on {gpus:,} GPUs, each as fast as a rank of this run", title_justify="left"
    )
    table.add_column("at the rate of")
    for name in ("GPU-hours", "days", "cost", "per trillion tokens"):
        table.add_column(name, justify="right")
    for name, needed in what_if_gpu_hours(summary, tokens).items():
        table.add_row(
            _RATE_LABELS[name],
            format_gpu_hours(needed),
            f"{needed / gpus / 24:,.1f}",
            format_usd(needed, usd_per_gpu_hour),
            f"{needed / tokens * 1e12:,.0f}",
        )
    published = PUBLISHED_GPU_HOURS["pre_train"]
    table.add_row(
        "DeepSeek-V3's pre-training, 14.8 T tokens",
        f"{published:,}",
        f"{published / gpus / 24:,.1f}",
        format_usd(published, PUBLISHED_USD_PER_GPU_HOUR),
        f"{PUBLISHED_GPU_HOURS_PER_TRILLION_TOKENS:,}",
    )
    return table


def what_if_gpu_hours(summary: LedgerSummary, tokens: float) -> dict[str, float]:
    """Return the GPU-hours of `tokens` at each rate; empty before the first step."""
    found = {}
    if summary.step_ms_per_token is not None:
        found["its last steps, their median"] = summary.step_ms_per_token * tokens / 3.6e6
    if summary.gpu_hours_per_trillion_tokens is not None:
        found["everything it was charged"] = summary.gpu_hours_per_trillion_tokens * tokens / 1e12
    return found


def render_project(
    project: Project, summaries: Mapping[Path, LedgerSummary], usd_per_gpu_hour: float
) -> RenderableType:
    """Return tables of a project's runs, the budget left in each phase, and the published figures."""
    totals = ProjectTotals.from_summaries(project, summaries)
    runs = Table(title=f"{project.path}: {_plural(len(project.runs), 'run', 'runs')}", title_justify="left")
    for name in ("run", "phase", "GPU-hours", "goodput", "tokens retained"):
        runs.add_column(name, justify="left" if name in ("run", "phase") else "right")
    for run in project.runs:
        summary = summaries.get(run)
        cells = ("-", "-", "-", "-") if summary is None else _run_cells(summary)
        runs.add_row(run.name, *cells)
    phases = Table(title="budget by phase", title_justify="left")
    for name in ("phase", "GPU-hours", "budget", "left", "of the budget", "DeepSeek-V3"):
        phases.add_column(name, justify="left" if name == "phase" else "right")
    for phase, spent_ms in totals.gpu_ms_by_phase.items():
        budget, spent = project.gpu_hours.get(phase), to_gpu_hours(spent_ms)
        if budget is None and not spent:
            continue
        of_budget = (
            ("-", "-", "-")
            if budget is None
            else (format_gpu_hours(budget), format_gpu_hours(budget - spent), format_percent(spent / budget))
        )
        phases.add_row(to_label(phase), format_gpu_hours(spent), *of_budget, f"{PUBLISHED_GPU_HOURS[phase]:,}")
    table, spent = _plain(), to_gpu_hours(totals.allocated_ms)
    tokens = totals.tokens_by_phase["pre_train"]
    table.add_row("cost", f"{format_gpu_hours(spent)} GPU-hours", format_usd(spent, usd_per_gpu_hour))
    if totals.inherited_from_others_ms:
        table.add_row(
            "inherited",
            f"{format_gpu_hours(to_gpu_hours(totals.inherited_from_others_ms))} GPU-hours",
            "from runs outside the project",
        )
    _add_headline(table, to_gpu_hours(totals.gpu_ms_by_phase["pre_train"]) / tokens * 1e12 if tokens else None)
    _add_whole(table, spent)
    return Group(runs, phases, table)


def _run_cells(summary: LedgerSummary) -> tuple[str, str, str, str]:
    run_tokens = sum(summary.tokens_by_phase.values())
    spent = format_gpu_hours(to_gpu_hours(summary.allocated_ms))
    return to_label(summary.phase), spent, format_percent(summary.goodput), f"{run_tokens:,}"


def _plural(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
