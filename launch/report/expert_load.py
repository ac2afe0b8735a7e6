"""Expert load section of a report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ...trainer.telemetry.events import numbers_in_list
from ..answers.blocks import Block, Figure, FigureRow, LegendEntry, MissingDataNotice, PageSection
from .heat_map import heat_map
from .plot import Plot, Series
from .run_record import RunRecord

_PREFIX = "tokens_per_expert/"
_SHADES = (
    LegendEntry("a quarter of the mean or less", "shade-low"),
    LegendEntry("the mean", "shade-mean"),
    LegendEntry("four times or more", "shade-high"),
)


def expert_load_section(record: RunRecord) -> PageSection:
    """Return the section: expert imbalance over steps, and a heat map per MoE layer."""
    return PageSection("experts", "Expert load", [*_blocks(record)])


def _blocks(record: RunRecord) -> Iterator[Block]:
    names = dict.fromkeys(key for event in record.step_events for key in event.values if key.startswith(_PREFIX))
    if not names:
        why = "no step is logged yet" if not record.step_events else "the model has no routed experts"
        yield MissingDataNotice(f"No expert load: {why}.", "")
        return
    yield from _violations(record)
    maps = [figure for name in names if (figure := _map(record, name)) is not None]
    yield FigureRow(maps, "Expert load per logged step", _SHADES)


def _violations(record: RunRecord) -> Iterator[Block]:
    series = [
        Series("experts", record.metric_points("load/max_violation"), "c1"),
        Series("ranks", record.metric_points("load/ranks/max_violation"), "c2"),
        Series("nodes", record.metric_points("load/nodes/max_violation"), "c3"),
    ]
    plot = Plot([each for each in series if any(y for _, y in each.points)], height=190, y_axis_from_zero=True)
    picture = plot.svg()
    if picture is not None:
        title = "Expert imbalance, worst layer (max load ÷ mean − 1)"
        yield Figure(title, picture, plot.legend())


def _map(record: RunRecord, name: str) -> Figure | None:
    columns = [column for event in record.step_events if (column := numbers_in_list(event.values.get(name)))]
    columns = [column for column in columns if len(column) == len(columns[0])]
    if not columns:
        return None
    layer, last = name.removeprefix(_PREFIX), columns[-1]
    picture = heat_map(columns, f"load of the {len(last)} experts of {layer}")
    return Figure(layer.replace("_", " "), picture, (), _words(last))


def _words(loads: Sequence[float]) -> str:
    """Describe the last step's loads."""
    mean = sum(loads) / len(loads)
    if not mean or not math.isfinite(mean):
        return ""
    unused = sum(load == 0 for load in loads)
    idle = f", {unused} unused" if unused else ""
    return f"last: {min(loads) / mean:.2f} to {max(loads) / mean:.2f} of the mean{idle}"
