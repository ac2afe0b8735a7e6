"""Live view of a run, in a few lines of a terminal."""

import math
from collections.abc import Iterator, Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ...comm.units import format_duration, format_gpu_hours, format_percent, format_si
from ...trainer.ledger.summary import LedgerSummary
from ...trainer.ledger.terms import to_label
from ...trainer.telemetry.events import (
    CheckpointSaved,
    Event,
    InitialWeightsLoaded,
    LossEvaluated,
    MemoryMeasured,
    RunResumed,
    RunStarted,
    RunStopped,
    StepLogged,
    TraceWritten,
    WarningRaised,
)
from ...trainer.telemetry.format import describe_event, strip_control_codes
from .budget import rate_card, spent_by_bucket
from .run_follower import RunSnapshot

HEARTBEAT_TIMEOUT_SECONDS = 30.0
"""Launchers write a heartbeat every two seconds: one without for this long was killed or cannot write."""
_BAR = 36
_BLOCKS = "▁▂▃▄▅▆▇█"
_SHOWN = (
    *(LossEvaluated, CheckpointSaved, RunResumed, InitialWeightsLoaded, WarningRaised, RunStopped, TraceWritten),
    MemoryMeasured,
)
_LATEST = 6
_NEARLY_SPENT = 0.9
"""Share of the budget from which the bar is red."""


def render_frame(snapshot: RunSnapshot) -> RenderableType:
    """Return the whole frame; figures that are not known yet have no line."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    step = snapshot.last_event(StepLogged)
    grid.add_row("state", Text(*_state(snapshot)))
    for name, shown in (*_progress(snapshot, step), *_figures(snapshot, step), *_cost(snapshot, step)):
        grid.add_row(name, shown)
    return Group(Text(str(snapshot.run_dir), "bold"), Text(""), grid, *_latest(snapshot.events))


def _state(snapshot: RunSnapshot) -> tuple[str, str]:
    stop = snapshot.last_event(RunStopped)
    if snapshot.has_ended:
        reason = "its launcher released the GPUs" if stop is None else stop.reason
        return (reason, "green") if reason == "done" else (f"ended: {reason}", "red")
    if snapshot.seconds_since_heartbeat is not None and snapshot.seconds_since_heartbeat > HEARTBEAT_TIMEOUT_SECONDS:
        return f"no heartbeat from the launcher for {format_duration(snapshot.seconds_since_heartbeat)}", "red"
    starting = RunStarted | RunResumed | InitialWeightsLoaded | RunStopped
    if not snapshot.events or isinstance(snapshot.events[-1], starting):
        return "starting up", "yellow"
    return "training", "green"


def _progress(snapshot: RunSnapshot, step: StepLogged | None) -> Iterator[tuple[str, RenderableType]]:
    first = step or snapshot.last_event(RunStarted)
    if first is None or not first.total_steps:
        yield "step", Text("none yet")
        return
    words = [f"{first.step:,} of {first.total_steps:,}"]
    if step is not None and not snapshot.has_ended:
        words.append(f"{format_duration(step.eta_seconds)} left")
    yield "step", _bar_with_text(_bar(first.step, first.total_steps, "cyan"), "  ".join(words))


def _figures(snapshot: RunSnapshot, step: StepLogged | None) -> Iterator[tuple[str, RenderableType]]:
    if step is None:
        return
    losses = [event.loss for event in snapshot.events if isinstance(event, StepLogged)]
    yield "loss", Text(f"{step.loss:.3f}  {sparkline(losses, _BAR)}")
    more = [] if step.mtp_loss is None else [f"mtp {step.mtp_loss:.3f}"]
    evaluation = snapshot.last_event(LossEvaluated)
    if evaluation is not None:
        more.append(f"validation {evaluation.loss:.3f} at step {evaluation.step:,}")
    more.append(f"gradient {step.grad_norm:.2f}")
    yield "", Text("  ".join(more))
    yield "throughput", Text(f"{format_si(step.tokens_per_second)} tokens/s  MFU {format_percent(step.mfu)}")
    if (violation := step.metric("load/max_violation")) is not None:
        yield "expert load", Text(f"largest {1 + violation:.2f} x the mean")


def _cost(snapshot: RunSnapshot, step: StepLogged | None) -> Iterator[tuple[str, RenderableType]]:
    summary = snapshot.summary
    if summary is None:
        yield "budget", Text("no readable ledger")
        return
    style = "red" if summary.budget_share > _NEARLY_SPENT else "green"
    spent = _bar(summary.gpu_hours, summary.budget_gpu_hours, style)
    yield (
        "budget",
        _bar_with_text(
            spent, f"{format_gpu_hours(summary.gpu_hours)} of {format_gpu_hours(summary.budget_gpu_hours)} GPU-hours"
        ),
    )
    projected = None if step is None else step.projected_gpu_hours
    rate, words = rate_card(summary.gpu_hours_per_trillion_tokens), []
    if projected is not None and not snapshot.has_ended:
        words.append(f"{format_gpu_hours(projected)} GPU-hours projected at the end")
    if summary.tokens_retained:
        words.append(f"{rate.value} {rate.name} ({rate.note})")
    if words:
        yield "", Text("  ".join(words))
    yield "goodput", Text("  ".join([format_percent(summary.goodput), *_losses(summary)]))


def _losses(summary: LedgerSummary) -> list[str]:
    """Return the three largest buckets of time that was not productive."""
    spent = spent_by_bucket(summary)
    rest = sorted((name for name in spent if spent[name] and name != "productive"), key=lambda name: -spent[name])
    return [f"{to_label(name)} {format_percent(spent[name] / max(1, summary.allocated_ms))}" for name in rest[:3]]


def _latest(events: Sequence[Event]) -> Iterator[Text]:
    shown = [event for event in events if isinstance(event, _SHOWN)][-_LATEST:]
    if shown:
        yield Text("")
    for event in shown:
        time = datetime.fromtimestamp(event.time).astimezone().strftime("%H:%M:%S")
        style = "red" if isinstance(event, WarningRaised) else ""
        yield Text.assemble((f"{time}  ", "dim"), (_event_line(event), style), no_wrap=True, overflow="ellipsis")


def _event_line(event: Event) -> str:
    """Return one line about an event; warnings are short, since the terminal may be narrow."""
    if not isinstance(event, WarningRaised):
        return describe_event(event)
    return strip_control_codes(f"step {event.step}, {event.about}: {event.message}")


def _bar(done: float, total: float, style: str) -> ProgressBar:
    return ProgressBar(total=total, completed=done, width=_BAR, complete_style=style, finished_style=style)


def _bar_with_text(bar: ProgressBar, words: str) -> Table:
    row = Table.grid(padding=(0, 2))
    row.add_column(width=_BAR)
    row.add_column()
    row.add_row(bar, words)
    return row


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw the last `width` finite values as block characters, scaled from the lowest to the highest."""
    finite = [value for value in values if math.isfinite(value)][-width:]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round((value - low) / (high - low) * top) if high > low else 0] for value in finite)
