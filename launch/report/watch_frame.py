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
from ...trainer.telemetry.events import Event, parse_number
from ...trainer.telemetry.format import describe_event, strip_control_codes
from .budget import rate_card, spent_by_bucket
from .run_follower import RunSnapshot

HEARTBEAT_TIMEOUT_SECONDS = 30.0
"""Launchers write a heartbeat every two seconds: one without for this long was killed or cannot write."""
_BAR = 36
_BLOCKS = "▁▂▃▄▅▆▇█"
_SHOWN_KINDS = frozenset({"evaluation", "checkpoint", "resume", "start", "warning", "stop", "trace", "memory"})
_LATEST = 6
_NEARLY_SPENT = 0.9
"""Share of the budget from which the bar is red."""


def render_frame(snapshot: RunSnapshot) -> RenderableType:
    """Return the whole frame; figures that are not known yet have no line."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    step = snapshot.last_event("step")
    grid.add_row("state", Text(*_state(snapshot)))
    for name, shown in (*_progress(snapshot, step), *_figures(snapshot, step), *_cost(snapshot, step)):
        grid.add_row(name, shown)
    return Group(Text(str(snapshot.run_dir), "bold"), Text(""), grid, *_latest(snapshot.events))


def _state(snapshot: RunSnapshot) -> tuple[str, str]:
    stop = snapshot.last_event("stop")
    if snapshot.has_ended:
        reason = "its launcher released the GPUs" if stop is None else str(stop.values.get("reason"))
        return (reason, "green") if reason == "done" else (f"ended: {reason}", "red")
    if snapshot.seconds_since_heartbeat is not None and snapshot.seconds_since_heartbeat > HEARTBEAT_TIMEOUT_SECONDS:
        return f"no heartbeat from the launcher for {format_duration(snapshot.seconds_since_heartbeat)}", "red"
    if not snapshot.events or snapshot.events[-1].kind in ("run", "resume", "start", "stop"):
        return "starting up", "yellow"
    return "training", "green"


def _progress(snapshot: RunSnapshot, step: Event | None) -> Iterator[tuple[str, RenderableType]]:
    first = step or snapshot.last_event("run")
    total = None if first is None else parse_number(first.values.get("total_steps"))
    if first is None or not total or not 0 < total < math.inf:
        yield "step", Text("none yet")
        return
    done = 0 if step is None else step.step
    words = [f"{done:,} of {total:,.0f}"]
    seconds = None if step is None else parse_number(step.values.get("eta_seconds"))
    if seconds is not None and not snapshot.has_ended:
        words.append(f"{format_duration(seconds)} left")
    yield "step", _bar_with_text(_bar(done, total, "cyan"), "  ".join(words))


def _figures(snapshot: RunSnapshot, step: Event | None) -> Iterator[tuple[str, RenderableType]]:
    if step is None:
        return
    losses = [
        value for event in snapshot.events if event.kind == "step" and (value := parse_number(event.values.get("loss")))
    ]
    yield "loss", Text(f"{_value(step, 'loss', '.3f')}  {sparkline(losses, _BAR)}")
    more = [f"mtp {_value(step, 'loss/mtp', '.3f')}"] if step.values.get("loss/mtp") is not None else []
    evaluation = snapshot.last_event("evaluation")
    if evaluation is not None:
        more.append(f"validation {_value(evaluation, 'loss', '.3f')} at step {evaluation.step:,}")
    more.append(f"gradient {_value(step, 'grad_norm', '.2f')}")
    yield "", Text("  ".join(more))
    rate = parse_number(step.values.get("tokens_per_second"))
    speed = [] if rate is None else [f"{format_si(rate)} tokens/s"]
    share = parse_number(step.values.get("mfu"))
    speed += [] if share is None else [f"MFU {format_percent(share)}"]
    yield "throughput", Text("  ".join(speed))
    violation = parse_number(step.values.get("load/max_violation"))
    if violation is not None:
        yield "expert load", Text(f"largest {1 + violation:.2f} x the mean")


def _cost(snapshot: RunSnapshot, step: Event | None) -> Iterator[tuple[str, RenderableType]]:
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
    projected = None if step is None else parse_number(step.values.get("projected_gpu_hours"))
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
    shown = [event for event in events if event.kind in _SHOWN_KINDS][-_LATEST:]
    if shown:
        yield Text("")
    for event in shown:
        time = datetime.fromtimestamp(event.time).astimezone().strftime("%H:%M:%S")
        style = "red" if event.kind == "warning" else ""
        yield Text.assemble((f"{time}  ", "dim"), (_event_line(event), style), no_wrap=True, overflow="ellipsis")


def _event_line(event: Event) -> str:
    """Return one line about an event; warnings are short, since the terminal may be narrow."""
    if event.kind != "warning":
        try:
            return describe_event(event)
        except (KeyError, TypeError, ValueError, OverflowError):  # of another version, with other values
            return f"{event.kind} at step {event.step}"
    return strip_control_codes(
        f"step {event.step}, {event.values.get('about', 'telemetry')}: {event.values.get('message')}"
    )


def _bar(done: float, total: float, style: str) -> ProgressBar:
    return ProgressBar(total=total, completed=done, width=_BAR, complete_style=style, finished_style=style)


def _bar_with_text(bar: ProgressBar, words: str) -> Table:
    row = Table.grid(padding=(0, 2))
    row.add_column(width=_BAR)
    row.add_column()
    row.add_row(bar, words)
    return row


def _value(event: Event, key: str, form: str) -> str:
    value = parse_number(event.values.get(key))
    return "–" if value is None else format(value, form)


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw the last `width` finite values as block characters, scaled from the lowest to the highest."""
    finite = [value for value in values if math.isfinite(value)][-width:]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round((value - low) / (high - low) * top) if high > low else 0] for value in finite)
