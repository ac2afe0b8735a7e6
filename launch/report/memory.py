"""Memory section of a report."""

import math
from collections.abc import Iterator
from statistics import median

from ...comm.units import format_bytes
from ...trainer.telemetry.events import Event, numbers_in_list, parse_number
from ..answers.blocks import Block, MissingDataNotice, Quantity, table
from .plot import Plot, Series
from .run_record import RunRecord

_MOST_ROWS = 16


def memory_section(record: RunRecord) -> Iterator[Block]:
    """Yield the memory over steps on the largest and the median rank, and the latest of each rank."""
    samples = list(_whole_samples(record))
    if not samples:
        hint = "It is measured at step 2 and every telemetry.terms_every steps, on GPUs and on Linux."
        yield MissingDataNotice("Memory is not recorded.", hint)
        return
    last, now, peak = samples[-1]
    limit = parse_number(last.values.get("limit"))
    yield from Plot(
        [
            Series("largest rank, peak", [(event.step, max(peak)) for event, _, peak in samples], "c2"),
            Series("largest rank", [(event.step, max(now)) for event, now, _ in samples], "c1"),
            Series("median rank", [(event.step, median(now)) for event, now, _ in samples], "c5"),
        ],
        height=190,
        y_axis_from_zero=True,
        reference_lines=[] if limit is None else [("capacity", limit)],
        format_value=format_bytes,
        format_tick=format_bytes,
    ).figures(f"Bytes {last.values.get('quantity')}, over optimizer steps")
    if len(now) <= _MOST_ROWS:
        lines = [
            (f"rank {rank}", Quantity(held, format_bytes(held)), Quantity(most, format_bytes(most)))
            for rank, (held, most) in enumerate(zip(now, peak, strict=True))
        ]
        yield table("Memory per rank", ("", "latest", "peak"), lines)


def _whole_samples(record: RunRecord) -> Iterator[tuple[Event, list[float], list[float]]]:
    """Yield the events that have two finite numbers per rank, with these: the bytes now, and at the peak."""
    for event in record.events_of_kind("memory"):
        now, peak = (numbers_in_list(event.values.get(key)) for key in ("now", "peak"))
        if len(now) == len(peak) > 0 and all(map(math.isfinite, [*now, *peak])):
            yield event, now, peak
