"""The first lines of a report: what it is of, and the figures that one asks for first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from statistics import median

from ...trainer.ledger.render import hours, percent
from ...trainer.ledger.terms import PUBLISHED_GPU_HOURS_PER_TRILLION_TOKENS
from ...trainer.telemetry.describe import clock, metric
from ...trainer.telemetry.events import as_number
from .blocks import Card
from .record import Point, RunRecord

UNKNOWN = "–"


def state(record: RunRecord) -> tuple[str, str]:
    """How the run stands, in a word, and the class of that word's color."""
    summary, stop = record.summary, record.last("stop")
    if summary is not None and summary.running:
        return "running, or its launcher was killed", "busy"
    if stop is None:
        return ("not begun", "busy") if summary is None else ("ended by a fault", "bad")
    begun = record.last("run")
    if begun is not None and begun.time > stop.time:
        return "ended by a fault", "bad"
    reason = str(stop.values.get("reason"))
    if reason == "done":
        return "done", "good"
    return ("stopped" if reason.startswith("stopped") else "ended by a fault"), "bad"


def facts(record: RunRecord) -> Iterator[str]:
    """Lines below the title."""
    run = record.last("run")
    if run is not None:
        values = run.values
        total, active = (metric(as_number(values.get(key)) or 0) for key in ("parameters", "active_parameters"))
        yield f"{total} parameters, {active} active a token"
        numbers = f"{values.get('compute_dtype')}{', Linears in FP8' if values.get('linear') == 'fp8' else ''}"
        yield f"{values.get('ranks')} ranks on {values.get('device')}, computing in {numbers}"
    sizes = [f"{name} {record.setting(f'topology.{name}')}" for name in ("pp", "edp", "ep")]
    if record.setting("topology") is not None:
        yield f"{', '.join(sizes)}; {record.setting('schedule.name')}; exchange {record.setting('exchange.name')}"
    if record.events:
        first, last = record.events[0].time, record.events[-1].time
        began = datetime.fromtimestamp(first).astimezone().strftime("%-d %B %Y, %H:%M")
        yield f"began {began}, {clock(last - first)} to its last word"


def cards(record: RunRecord) -> list[Card]:
    """The headline."""
    return [*_losses(record), _tokens(record), *_cost(record), _speed(record)]


def _losses(record: RunRecord) -> Iterator[Card]:
    evaluation = record.points("loss", "evaluation")
    if evaluation:
        step, loss = evaluation[-1]
        floor = record.value("unigram_entropy", "evaluation")
        beside = "" if floor is None else f"; unigram entropy {floor:.3f}"
        yield Card("validation loss", f"{loss:.3f}", "nats a token", f"step {step:,.0f}{beside}")
        return
    training = record.points("loss")
    step, loss = training[-1] if training else (0, math.nan)
    note = f"step {step:,.0f}; no evaluation yet" if training else "no step yet"
    yield Card("training loss", f"{loss:.3f}" if training else UNKNOWN, "nats a token" if training else "", note)


def _tokens(record: RunRecord) -> Card:
    summary, wanted = record.summary, as_number(record.setting("training.tokens"))
    target = "" if wanted is None else f"of {metric(wanted)} asked for"
    if summary is None:
        tokens = record.value("tokens")
        return Card("tokens", UNKNOWN if tokens is None else metric(tokens), "", target)
    undone = summary.tokens_consumed - summary.tokens_retained
    lost = f"; {metric(undone)} undone or skipped" if undone else ""
    return Card("tokens retained", metric(summary.tokens_retained), "", target + lost)


def _cost(record: RunRecord) -> Iterator[Card]:
    summary = record.summary
    published = f"{PUBLISHED_GPU_HOURS_PER_TRILLION_TOKENS:,}"
    if summary is None:
        for name in ("GPU-hours", "GPU-hours a trillion retained tokens", "goodput"):
            yield Card(name, UNKNOWN, "", "no ledger to read")
        return
    share = f"{percent(summary.budget_share)} of its budget of {hours(summary.budget_gpu_hours)}"
    yield Card("GPU-hours", hours(summary.gpu_hours), "", share)
    rate = summary.gpu_hours_per_trillion_tokens
    shown = UNKNOWN if rate is None else f"{rate:,.0f}"
    yield Card("GPU-hours a trillion retained tokens", shown, "", f"DeepSeek-V3: {published}")
    yield Card("goodput", percent(summary.goodput), "", "of the time held is in the weights")


def _speed(record: RunRecord) -> Card:
    """Medians; the first step of a run warms up, and counts only where it is all there is."""
    rates, shares = (_settled(record.points(key)) for key in ("tokens_per_second", "mfu"))
    rate = f"median; {metric(median(rates))} tokens a second" if rates else ""
    return Card("MFU", percent(median(shares)) if shares else UNKNOWN, "", rate)


def _settled(points: Sequence[Point]) -> list[float]:
    return [value for _, value in points[1:] or points if math.isfinite(value)]
