"""`shoestring trace`: time terms of a traced run by rank, and a picture of one pair of layers."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...comm.errors import ConfigError, Problem
from ...trainer.ledger.terms import STEP_TIME_TERMS
from ..answers.blocks import Answer, Block, Figure, records_table
from ..answers.options import write_output

if TYPE_CHECKING:
    from ...trainer.telemetry.trace import Span


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("place", type=Path, metavar="TRACE", help="run directory, or its merged trace.json")
    picture = "write a picture of an overlapped pair of MoE layers"
    parser.add_argument("--svg", type=Path, metavar="FILE", help=picture)


def answer(options: argparse.Namespace) -> Answer:
    """Return the terms of the trace that the options name, and write its picture. Raises `ConfigError`."""
    ranks = open_trace(options.place)
    if options.svg is not None:
        from ..report.trace_svg import svg_layer_pair

        try:
            picture = svg_layer_pair(ranks)
        except ValueError as error:  # the trace has no such pair
            raise ConfigError([Problem("--svg", str(options.svg), str(error))]) from None
        write_output(options.svg, f"{picture}\n", "--svg")
    return trace_answer(ranks)


def open_trace(place: Path) -> "dict[int, list[Span]]":
    """Read the spans of each rank; `place` is a run's directory or its merged file. Raises `ConfigError`."""
    from ...trainer.run.profiling import TRACE_FOLDER
    from ...trainer.telemetry.trace import TRACE_FILE, read_trace

    path = place / TRACE_FOLDER / TRACE_FILE if place.is_dir() else place
    try:
        return read_trace(path)
    except OSError as error:
        hint = f"has no {TRACE_FOLDER}/{TRACE_FILE} ({error.strerror}); a run with telemetry.trace=true writes one"
        raise ConfigError([Problem("TRACE", str(place), hint)]) from None
    except ValueError as error:
        raise ConfigError([Problem("TRACE", str(path), str(error))]) from None


def trace_answer(ranks: "Mapping[int, Sequence[Span]]") -> Answer:
    """Return the seconds of each term by rank; blocks show milliseconds, without terms that are 0 on every rank."""
    from ...trainer.telemetry.trace import summarize_trace

    terms = {str(rank): summarize_trace(ranks[rank]) for rank in sorted(ranks)}
    shown = [name for name in STEP_TIME_TERMS if any(seconds[name] for seconds in terms.values())]
    records = [{"rank": rank, **seconds} for rank, seconds in terms.items()]
    formats = dict.fromkeys(shown, lambda seconds: f"{1e3 * seconds:.1f}")
    title = "Milliseconds per term, all traced steps; instructions without their waits"
    blocks: list[Block] = [
        records_table(title, {name: name for name in ("rank", *shown)}, records, formats),
        *_picture(ranks),
    ]
    return Answer.from_blocks("Time of a traced run", terms, blocks)


def _picture(ranks: "Mapping[int, Sequence[Span]]") -> Iterator[Block]:
    """Yield the picture of an overlapped pair of MoE layers, if the trace has one."""
    from ..report.trace_svg import find_layer_pairs, svg_layer_pair

    if any(pair for rank, spans in ranks.items() for pair in find_layer_pairs(rank, spans)):
        yield Figure("", lambda: svg_layer_pair(ranks), is_wide=True)
