"""Memory section of a report."""

from collections.abc import Iterator
from statistics import median

from ...comm.units import format_bytes
from ...trainer.telemetry.events import MemoryMeasured
from ..answers.blocks import Block, MissingDataNotice, Quantity, table
from .plot import Plot, Series
from .run_record import RunRecord

_MOST_ROWS = 16


def memory_section(record: RunRecord) -> Iterator[Block]:
    """Yield the memory over steps on the largest and the median rank, and the latest of each rank."""
    events = [event for event in record.events_of(MemoryMeasured) if len(event.now) == len(event.peak)]
    if not events:
        hint = "It is measured at step 2 and every telemetry.terms_every steps, on GPUs and on Linux."
        yield MissingDataNotice("Memory is not recorded.", hint)
        return
    last = events[-1]
    yield from Plot(
        [
            Series("largest rank, peak", [(event.step, max(event.peak)) for event in events], "c2"),
            Series("largest rank", [(event.step, max(event.now)) for event in events], "c1"),
            Series("median rank", [(event.step, median(event.now)) for event in events], "c5"),
        ],
        height=190,
        y_axis_from_zero=True,
        reference_lines=[] if last.limit is None else [("capacity", last.limit)],
        format_value=format_bytes,
        format_tick=format_bytes,
    ).figures(f"Bytes {last.quantity}, over optimizer steps")
    if len(last.now) <= _MOST_ROWS:
        lines = [
            (f"rank {rank}", Quantity(held, format_bytes(held)), Quantity(most, format_bytes(most)))
            for rank, (held, most) in enumerate(zip(last.now, last.peak, strict=True))
        ]
        yield table("Memory per rank", ("", "latest", "peak"), lines)
