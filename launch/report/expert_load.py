"""Expert load section of a report. Letters: N steps, E experts."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from ...trainer.telemetry.events import numbers_in_list
from ..answers.blocks import Block, Figure, FigureRow, LegendEntry, MissingDataNotice
from . import svg
from .plot import Plot, Series
from .run_record import RunRecord

_PREFIX = "tokens_per_expert/"
_LEGEND = (
    LegendEntry("a quarter of the mean or less", "c1"),
    LegendEntry("the mean", "shade-mean"),
    LegendEntry("four times or more", "c2"),
)
_OCTAVES = 2
"""Range of colors: from a quarter of the mean to four times the mean."""
_SHADES = 4
"""Shades on each side of the mean."""
MAX_COLUMNS = 120


def expert_load_section(record: RunRecord) -> Iterator[Block]:
    """Yield the expert imbalance over steps, and a heat map per MoE layer."""
    names = dict.fromkeys(key for event in record.step_events for key in event.metrics if key.startswith(_PREFIX))
    if not names:
        why = "no step is logged yet" if not record.step_events else "the model has no routed experts"
        yield MissingDataNotice(f"No expert load: {why}.")
        return
    yield from _violations(record)
    maps = [figure for name in names if (figure := _map(record, name)) is not None]
    yield FigureRow(maps, "Expert load per logged step", _LEGEND)


def _violations(record: RunRecord) -> Iterator[Block]:
    series = [
        Series("experts", record.step_points(lambda step: step.metric("load/max_violation")), "c1"),
        Series("ranks", record.step_points(lambda step: step.metric("load/ranks/max_violation")), "c2"),
        Series("nodes", record.step_points(lambda step: step.metric("load/nodes/max_violation")), "c3"),
    ]
    plot = Plot([each for each in series if any(y for _, y in each.points)], height=190, y_axis_from_zero=True)
    yield from plot.figures("Expert imbalance, worst layer (max load ÷ mean − 1)")


def _map(record: RunRecord, name: str) -> Figure | None:
    columns = [column for event in record.step_events if (column := numbers_in_list(event.metrics.get(name)))]
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


def heat_map(loads: Sequence[Sequence[float]], label: str) -> Markup:
    """Draw `loads`, one sequence of expert loads per step; neighboring steps are averaged if there are too many.

    A cell is blue below the mean, amber above, clear at it. One path per shade draws all of its cells: with half an
    octave per shade and 120 columns, the 256 experts of a layer of DeepSeek-V3 take 20 to 65 kB.
    """
    shades_EN = _shades(_averaged(np.array(loads, dtype=np.float64))).T
    experts, columns = shades_EN.shape
    cells = [
        svg.path(
            "".join(_runs(shades_EN == side * shade)),
            color,
            stroke_opacity=shade / _SHADES,
            transform="translate(0 0.5)",
        )
        for side, color in ((-1, "c1"), (1, "c2"))
        for shade in range(1, _SHADES + 1)
        if (shades_EN == side * shade).any()
    ]
    stretched = {"class": "heat", "preserveAspectRatio": "none", "shape_rendering": "crispEdges"}
    return svg.page_picture(columns, experts, cells, label, **stretched)


def _averaged(loads_NE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of each stretch of neighboring steps."""
    starts = np.arange(0, len(loads_NE), -(-len(loads_NE) // MAX_COLUMNS))
    counts = np.diff(np.append(starts, len(loads_NE)))
    means: NDArray[np.float64] = np.add.reduceat(loads_NE, starts, axis=0) / counts[:, None]
    return means


def _shades(loads_NE: NDArray[np.float64]) -> NDArray[np.int8]:
    """Return shades from -4 to 4; 0 is the mean load of a step, also for a step without load."""
    mean_N1 = loads_NE.mean(axis=1, keepdims=True)
    ratios_NE = np.where(mean_N1 > 0, loads_NE / np.where(mean_N1 > 0, mean_N1, 1), 1)
    octaves_NE = np.log2(np.clip(ratios_NE, 2.0**-_OCTAVES, 2.0**_OCTAVES))
    shades_NE: NDArray[np.int8] = np.rint(octaves_NE / _OCTAVES * _SHADES).astype(np.int8)
    return shades_NE


def _runs(cells_EN: NDArray[np.bool_]) -> Iterator[str]:
    """Yield a line through each run of true cells in a row, relative to the end of the one before."""
    edges = np.diff(np.pad(cells_EN, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    # A row has as many begins as ends, both in order.
    (rows, begins), (_, ends) = np.nonzero(edges == 1), np.nonzero(edges == -1)
    x = y = 0
    for row, begin, end in zip(rows.tolist(), begins.tolist(), ends.tolist(), strict=True):
        yield f"m{begin - x} {row - y}h{end - begin}"
        x, y = end, row
