"""Head of a report: facts about the run, and its main figures."""

from collections.abc import Iterator
from datetime import datetime
from statistics import median

from ...comm.units import format_duration, format_percent, format_si
from ...trainer.telemetry.events import LossEvaluated, RunStarted, RunStopped, parse_number
from ..answers.blocks import HeadlineCard
from .budget import cost_cards
from .run_record import RunRecord

UNKNOWN_VALUE = "–"


def run_state(record: RunRecord) -> tuple[str, str]:
    """Return the state of the run, and the style class of its color."""
    summary, stop = record.summary, record.last_event(RunStopped)
    if summary is not None and summary.is_running:
        return "running (or its launcher was killed)", "busy"
    if stop is None:
        return ("not started", "busy") if summary is None else ("failed", "bad")
    begun = record.last_event(RunStarted)
    if begun is not None and begun.time > stop.time:
        return "failed", "bad"
    if stop.reason == "done":
        return "done", "good"
    return ("stopped" if stop.reason.startswith("stopped") else "failed"), "bad"


def header_lines(record: RunRecord) -> Iterator[str]:
    """Yield the lines below the title."""
    run = record.last_event(RunStarted)
    if run is not None:
        yield f"{format_si(run.parameters)} parameters, {format_si(run.active_parameters)} active per token"
        numbers = f"{run.compute_dtype}{', Linears in FP8' if run.linear == 'fp8' else ''}"
        yield f"{run.ranks} ranks on {run.device}, precision {numbers}"
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
    if (found := record.last_event(LossEvaluated)) is not None:
        note = f"step {found.step:,}; unigram entropy {found.unigram_entropy:.3f}"
        return HeadlineCard("validation loss", f"{found.loss:.3f}", "nats/token", note)
    if not record.step_events:
        return HeadlineCard("training loss", UNKNOWN_VALUE, "", "no step yet")
    last = record.step_events[-1]
    return HeadlineCard("training loss", f"{last.loss:.3f}", "nats/token", f"step {last.step:,}; no evaluation yet")


def _tokens(record: RunRecord) -> HeadlineCard:
    summary, wanted = record.summary, parse_number(record.config_value("training.tokens"))
    target = "" if wanted is None else f"of {format_si(wanted)} configured"
    if summary is None:
        tokens = format_si(record.step_events[-1].tokens) if record.step_events else UNKNOWN_VALUE
        return HeadlineCard("tokens", tokens, "", target)
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
    steps = record.step_events[1:] or record.step_events
    if not steps:
        return HeadlineCard("MFU", UNKNOWN_VALUE, "", "")
    rate = f"median; {format_si(median(step.tokens_per_second for step in steps))} tokens/s"
    return HeadlineCard("MFU", format_percent(median(step.mfu for step in steps)), "", rate)
