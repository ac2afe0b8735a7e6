"""The summary as a table for a person."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table

from .summary import Summary
from .terms import (
    BUCKETS,
    PUBLISHED_GPU_HOURS,
    PUBLISHED_GPU_HOURS_PER_TRILLION_TOKENS,
    PUBLISHED_TOTAL_GPU_HOURS,
    gpu_hours,
)

_MEANINGS = {**BUCKETS, "idle": "held after the run was done"}


def render(summary: Summary) -> RenderableType:
    """`summary` as two tables: where the time went, and how that stands beside the budgets."""
    return Group(_spending(summary), _comparison(summary))


def _spending(summary: Summary) -> Table:
    state = "still open, up to its last sign of life" if summary.running else "closed"
    table = Table(
        title=f"{summary.phase}: {_plural(summary.attempts, 'launch', 'launches')}, the last {state}",
        caption="One rank is one GPU, also on CPU.",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("spent on")
    table.add_column("GPU-hours", justify="right")
    table.add_column("share", justify="right")
    table.add_column("what it is")

    def row(name: str, milliseconds: int, meaning: str) -> None:
        share = percent(milliseconds / summary.allocated_ms) if summary.allocated_ms else "-"
        table.add_row(name.replace("_", " "), hours(gpu_hours(milliseconds)), share, meaning)

    row("productive", summary.productive_ms, f"{_plural(summary.steps_retained, 'step', 'steps')} in the weights")
    row("rolled_back", summary.rolled_back_ms, "steps undone by a crash")
    for bucket, milliseconds in summary.buckets.items():
        row(bucket, milliseconds, _MEANINGS[bucket])
    row("unknown", summary.unknown_ms, "charged to nothing")
    table.add_section()
    row("allocated", summary.allocated_ms, "all of the above")
    if summary.inherited_ms:
        inherited = hours(gpu_hours(summary.inherited_ms))
        table.add_row("inherited", inherited, "", "spent on the checkpoint it started from")
        table.add_row("total", hours(summary.gpu_hours), "", "allocated and inherited")
    return table


def _comparison(summary: Summary) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    spent, rate = summary.gpu_hours, summary.gpu_hours_per_trillion_tokens
    table.add_row("cost", f"{hours(spent)} GPU-hours", "")
    table.add_row("this run's budget", percent(summary.budget_share), f"of {hours(summary.budget_gpu_hours)} GPU-hours")
    table.add_row("tokens retained", f"{summary.tokens_retained:,}", f"of {summary.tokens_consumed:,} consumed")
    table.add_row(
        "GPU-hours per trillion retained tokens",
        "-" if rate is None else f"{rate:,.0f}",
        f"beside {PUBLISHED_GPU_HOURS_PER_TRILLION_TOKENS:,} of DeepSeek-V3",
    )
    phase_hours = PUBLISHED_GPU_HOURS[summary.phase]
    name = summary.phase.replace("_", " ")
    table.add_row(f"DeepSeek-V3's {name}", percent(spent / phase_hours), f"of {phase_hours:,} H800 GPU-hours")
    table.add_row(
        "DeepSeek-V3 in all", percent(spent / PUBLISHED_TOTAL_GPU_HOURS), f"of {PUBLISHED_TOTAL_GPU_HOURS:,} GPU-hours"
    )
    return table


def over_budget(spent: float, budget: float) -> str:
    """What the budget guard says, in GPU-hours, and the remedy."""
    return f"the run has used {spent:.4g} GPU-hours and its budget is {budget:.4g}; raise budget.gpu_hours to go on"


def hours(value: float) -> str:
    """GPU-hours with digits that fit their size; four decimals are a third of a GPU-second."""
    return f"{value:,.0f}" if value >= 10_000 else f"{value:,.2f}" if value >= 100 else f"{value:.4f}"


def percent(share: float) -> str:
    """`share` of 1 in percent, with three digits however small it is."""
    return f"{100 * share:.1f} %" if share == 0 or share >= 0.001 else f"{100 * share:.2g} %"


def _plural(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
