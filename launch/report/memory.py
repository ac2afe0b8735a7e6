"""Memory section of a report."""

import math
from collections.abc import Iterator
from statistics import median

from ...comm.units import format_bytes
from ...trainer.telemetry.events import Event, numbers_in_list, parse_number
from ..answers.blocks import Block, MissingDataNotice, PageSection, Quantity, table
from .plot import Plot, Series
from .run_record import RunRecord

_MOST_ROWS = 16


def memory_section(record: RunRecord) -> PageSection:
    """Return the section: memory over steps on the largest and the median rank, and the latest of each rank."""
    return PageSection("memory", "Memory", [*_blocks(record)])


def _blocks(record: RunRecord) -> Iterator[Block]:
    events = [event for event in record.events_of_kind("memory") if _is_whole(event)]
    if not events:
        hint = "It is measured at step 2 and every telemetry.terms_every steps, on GPUs and on Linux."
        yield MissingDataNotice("Memory is not recorded.", hint)
        return
    looks = [
        (event.step, numbers_in_list(event.values.get("now")), numbers_in_list(event.values.get("peak")))
        for event in events
    ]
    limit = parse_number(events[-1].values.get("limit"))
    yield from Plot(
        [
            Series("largest rank, peak", [(step, max(peak)) for step, _, peak in looks], "c2"),
            Series("largest rank", [(step, max(now)) for step, now, _ in looks], "c1"),
            Series("median rank", [(step, median(now)) for step, now, _ in looks], "c5"),
        ],
        height=190,
        y_axis_from_zero=True,
        reference_lines=[] if limit is None else [("capacity", limit)],
        format_value=format_bytes,
        format_tick=format_bytes,
    ).figures(f"Bytes {events[-1].values.get('quantity')}, over optimizer steps")
    _, now, peak = looks[-1]
    if len(now) <= _MOST_ROWS:
        rows = zip(range(len(now)), now, peak, strict=True)
        lines = [
            (f"rank {rank}", Quantity(held, format_bytes(held)), Quantity(most, format_bytes(most)))
            for rank, held, most in rows
        ]
        yield table("Memory per rank", ("", "latest", "peak"), lines)


def _is_whole(event: Event) -> bool:
    """Return whether the event has two finite numbers per rank."""
    now, peak = (numbers_in_list(event.values.get(key)) for key in ("now", "peak"))
    return len(now) == len(peak) > 0 and all(map(math.isfinite, [*now, *peak]))
