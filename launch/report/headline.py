"""Head of a report: facts about the run, and its main figures."""

import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from statistics import median

from ...comm.units import format_duration, format_percent, format_si
from ...trainer.telemetry.events import parse_number
from ..answers.blocks import HeadlineCard
from .budget import cost_cards
from .run_record import Point, RunRecord

UNKNOWN_VALUE = "–"


def run_state(record: RunRecord) -> tuple[str, str]:
    """Return the state of the run, and the style class of its color."""
    summary, stop = record.summary, record.last_event("stop")
    if summary is not None and summary.is_running:
        return "running (or its launcher was killed)", "busy"
    if stop is None:
        return ("not started", "busy") if summary is None else ("failed", "bad")
    begun = record.last_event("run")
    if begun is not None and begun.time > stop.time:
        return "failed", "bad"
    reason = str(stop.values.get("reason"))
    if reason == "done":
        return "done", "good"
    return ("stopped" if reason.startswith("stopped") else "failed"), "bad"


def header_lines(record: RunRecord) -> Iterator[str]:
    """Yield the lines below the title."""
    run = record.last_event("run")
    if run is not None:
        values = run.values
        total, active = (format_si(parse_number(values.get(key)) or 0) for key in ("parameters", "active_parameters"))
        yield f"{total} parameters, {active} active per token"
        numbers = f"{values.get('compute_dtype')}{', Linears in FP8' if values.get('linear') == 'fp8' else ''}"
        yield f"{values.get('ranks')} ranks on {values.get('device')}, precision {numbers}"
    sizes = [f"{name} {record.config_value(f'topology.{name}')}" for name in ("pp", "edp", "ep")]
    if record.config_value("topology") is not None:
        dispatcher = f"token dispatcher {record.config_value('exchange.name')}"
        yield f"{', '.join(sizes)}; {record.config_value('schedule.name')}; {dispatcher}"
    if record.events:
        first, last = record.events[0].time, record.events[-1].time
        started = datetime.fromtimestamp(first).astimezone().strftime("%-d %B %Y, %H:%M")
        yield f"started {started}, ran {format_duration(last - first)}"


def headline_cards(record: RunRecord) -> list[HeadlineCard]:
    """Return the cards: loss, tokens, cost and throughput."""
    return [_loss(record), _tokens(record), *_cost(record), _speed(record)]


def _loss(record: RunRecord) -> HeadlineCard:
    evaluation = record.metric_points("loss", "evaluation")
    if evaluation:
        step, loss = evaluation[-1]
        floor = record.last_value("unigram_entropy", "evaluation")
        entropy = "" if floor is None else f"; unigram entropy {floor:.3f}"
        return HeadlineCard("validation loss", f"{loss:.3f}", "nats/token", f"step {step:,.0f}{entropy}")
    training = record.metric_points("loss")
    if not training:
        return HeadlineCard("training loss", UNKNOWN_VALUE, "", "no step yet")
    step, loss = training[-1]
    return HeadlineCard("training loss", f"{loss:.3f}", "nats/token", f"step {step:,.0f}; no evaluation yet")


def _tokens(record: RunRecord) -> HeadlineCard:
    summary, wanted = record.summary, parse_number(record.config_value("training.tokens"))
    target = "" if wanted is None else f"of {format_si(wanted)} configured"
    if summary is None:
        tokens = record.last_value("tokens")
        return HeadlineCard("tokens", UNKNOWN_VALUE if tokens is None else format_si(tokens), "", target)
    undone = summary.tokens_consumed - summary.tokens_retained
    lost = f"; {format_si(undone)} undone or skipped" if undone else ""
    return HeadlineCard("tokens retained", format_si(summary.tokens_retained), "", target + lost)


def _cost(record: RunRecord) -> Iterator[HeadlineCard]:
    if record.summary is not None:
        yield from cost_cards(record.summary)
        return
    for name in ("GPU-hours", "GPU-hours per trillion tokens", "goodput"):
        yield HeadlineCard(name, UNKNOWN_VALUE, "", "no readable ledger")


def _speed(record: RunRecord) -> HeadlineCard:
    """Return medians over steps, without the first one, which warms up."""
    rates, shares = (_settled(record.metric_points(key)) for key in ("tokens_per_second", "mfu"))
    rate = f"median; {format_si(median(rates))} tokens/s" if rates else ""
    return HeadlineCard("MFU", format_percent(median(shares)) if shares else UNKNOWN_VALUE, "", rate)


def _settled(points: Sequence[Point]) -> list[float]:
    return [value for _, value in points[1:] or points if math.isfinite(value)]
