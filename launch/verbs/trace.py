"""`shoestring trace`: time terms of a traced run by rank, and a picture of one pair of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table

from ...comm.errors import ConfigError, Problem
from ...trainer.ledger.terms import STEP_TIME_TERMS
from ...trainer.run.profiling import TRACE_FOLDER
from ...trainer.telemetry.trace import TRACE_FILE, Span, read_trace, summarize_trace
from ..report.trace_svg import svg_layer_pair


def open_trace(place: Path) -> dict[int, list[Span]]:
    """Read the spans of each rank; `place` is a run's directory or its merged file. Raises `ConfigError`."""
    path = place / TRACE_FOLDER / TRACE_FILE if place.is_dir() else place
    try:
        return read_trace(path)
    except OSError as error:
        hint = f"has no {TRACE_FOLDER}/{TRACE_FILE} ({error.strerror}); a run with telemetry.trace=true writes one"
        raise ConfigError([Problem("TRACE", str(place), hint)]) from None
    except ValueError as error:
        raise ConfigError([Problem("TRACE", str(path), str(error))]) from None


def trace_as_dict(ranks: Mapping[int, Sequence[Span]]) -> dict[str, dict[str, float]]:
    """Return the seconds of each term by rank."""
    return {str(rank): summarize_trace(ranks[rank]) for rank in sorted(ranks)}


def trace_time_table(ranks: Mapping[int, Sequence[Span]]) -> RenderableType:
    """Return a table of the terms in milliseconds, without terms that are 0 on every rank."""
    terms = {rank: summarize_trace(spans) for rank, spans in sorted(ranks.items())}
    shown = [name for name in STEP_TIME_TERMS if any(seconds[name] for seconds in terms.values())]
    table = Table(
        title="Milliseconds per term, all traced steps; instructions without their waits", title_justify="left"
    )
    for heading in ("rank", *shown):
        table.add_column(heading, justify="right")
    for rank, seconds in terms.items():
        table.add_row(str(rank), *(f"{1e3 * seconds[name]:.1f}" for name in shown))
    return table


def write_layer_pair_svg(ranks: Mapping[int, Sequence[Span]], path: Path) -> None:
    """Write the picture of an overlapped pair of MoE layers. Raises `ConfigError` if the trace has none."""
    try:
        path.write_text(f"{svg_layer_pair(ranks)}\n")
    except ValueError as error:
        raise ConfigError([Problem("--svg", str(path), str(error))]) from None
    except OSError as error:
        raise ConfigError([Problem("--svg", str(path), f"cannot be written: {error.strerror}")]) from None
