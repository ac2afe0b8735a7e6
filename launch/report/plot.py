"""Line plots over steps; hovering a step shows its values."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from markupsafe import Markup

from ...comm.units import ceil_div, format_number
from ..answers.blocks import Figure, LegendEntry
from . import svg
from .run_record import Point

_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 16.0, 12.0, 26.0
_NARROW = 600
"""Least pixels of a plot that spans the page; smaller ones keep their own width."""
_MOST_POINTS = 800
_MOST_BANDS = 240
_LARGEST = 1e150
"""Largest drawn magnitude, so that differences of drawn values stay finite."""
_NO_ROOM = 1e-12
"""Smallest relative range that is drawn: a smaller one is rounding noise."""
_MOST_DOTS = 12
"""A series of at most this many points shows each as a dot."""


@dataclass(frozen=True)
class Series:
    """One line of a plot. A value that is not finite, or beyond 1e150, leaves a gap."""

    name: str
    points: Sequence[Point]
    style: str = "c1"
    is_dashed: bool = False


def _is_drawn(value: float) -> bool:
    """Return whether a value can be drawn: not NaN, and not beyond 1e150."""
    return abs(value) < _LARGEST


@dataclass(frozen=True)
class Plot:
    """Line plot of several series."""

    series: Sequence[Series]
    width: float = 900
    height: float = 260
    y_axis_from_zero: bool = False
    reference_lines: Sequence[tuple[str, float]] = ()
    """(name, value) of horizontal lines."""
    step_annotations: Sequence[tuple[float, str]] = ()
    """(step, text) of vertical marks."""
    format_value: Callable[[float], str] = format_number
    """Formatter of values."""
    format_tick: Callable[[float], str] = format_number
    """Formatter of axis ticks."""
    has_legend: bool = True

    def figures(self, title: str, note: str = "") -> Iterator[Figure]:
        """Yield the plot with its legend; nothing if there is nothing to draw."""
        picture = self.svg()
        if picture is not None:
            # A wide plot keeps its text readable on a narrow page, which scrolls it.
            legend = [
                LegendEntry(each.name, each.style, "" if each.is_dashed else self.format_value(each.points[-1][1]))
                for each in self.series
                if each.points and self.has_legend
            ]
            yield Figure(title, picture, legend, note, is_wide=self.width > _NARROW)

    def svg(self) -> Markup | None:
        """Return the SVG, or None if there is nothing to draw."""
        if not self._finite_points:
            return None
        body = [*self._axes(), *self._marks(), *self._lines(), *self._bands()]
        names = ", ".join(each.name for each in self.series if each.points)
        width = f"display:block;width:100%;min-width:{min(self.width, _NARROW):g}px"
        return svg.page_picture(self.width, self.height, body, f"{names} over steps", style=width)

    @cached_property
    def _finite_points(self) -> list[Point]:
        return [point for series in self.series for point in series.points if _is_drawn(point[1])]

    @cached_property
    def _last(self) -> float:
        """Step at the right edge; the left edge is 0."""
        return max(1.0, *(x for x, _ in self._finite_points))

    @cached_property
    def _limits(self) -> tuple[float, float]:
        """Values at the lower and at the upper edge."""
        ys = [y for _, y in self._finite_points] + [y for _, y in self.reference_lines if _is_drawn(y)]
        low, high = min(ys), max(ys)
        if self.y_axis_from_zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if high - low <= _NO_ROOM * max(abs(low), abs(high), _NO_ROOM):  # a level line sits in the middle
            room = abs(low) / 2 or 1.0
            low, high = low - room, high + room
        room = 0.04 * (high - low)
        return low if self.y_axis_from_zero and low == 0 else low - room, high + room

    @property
    def _right(self) -> float:
        return self.width - _RIGHT

    @property
    def _bottom(self) -> float:
        return self.height - _BOTTOM

    def _x(self, step: float) -> float:
        return _LEFT + step / self._last * (self._right - _LEFT)

    def _y(self, value: float) -> float:
        low, high = self._limits
        return self._bottom - (value - low) / (high - low) * (self._bottom - _TOP)

    def _axes(self) -> Iterator[Markup]:
        for value in svg.tick_values(*self._limits, 5 if self.height > 200 else 4):
            y = self._y(value)
            yield svg.line(_LEFT, y, self._right, y, "rule")
            yield svg.text(_LEFT - 8, y + 4, self.format_tick(value), "faint", text_anchor="end")
        for value in svg.tick_values(0.0, self._last, 8 if self.width > _NARROW else 4):
            if value == int(value):
                yield svg.text(self._x(value), self._bottom + 18, f"{value:,.0f}", "faint", text_anchor="middle")
        for name, value in self.reference_lines:
            if _is_drawn(value):
                y = self._y(value)
                yield svg.line(_LEFT, y, self._right, y, "faint", stroke_dasharray="2 4")
                yield svg.text(self._right, y - 5, f"{name} {self.format_value(value)}", "faint", text_anchor="end")

    def _marks(self) -> Iterator[Markup]:
        for step, text in self.step_annotations:
            if step <= self._last:
                x = self._x(step)
                rule = svg.line(x, _TOP, x, self._bottom, "bad", stroke_dasharray="4 3", opacity=0.7)
                yield svg.group(f"step {step:,.0f}: {text}", [rule])

    def _lines(self) -> Iterator[Markup]:
        for series in self.series:
            points = downsample_points(series.points, _MOST_POINTS)
            shape = {"stroke_linejoin": "round", "stroke_linecap": "round"}
            if series.is_dashed:
                shape["stroke_dasharray"] = "1 5"
            yield svg.path(self._path(points), series.style, stroke_width=1.8, **shape)
            if len(points) <= _MOST_DOTS and not series.is_dashed:
                yield from (svg.dot(self._x(x), self._y(y), 2.5, series.style) for x, y in points if _is_drawn(y))

    def _path(self, points: Sequence[Point]) -> str:
        words, pen_is_down = [], False
        for x, y in points:
            if _is_drawn(y):
                words.append(f"{'L' if pen_is_down else 'M'}{self._x(x):.1f} {self._y(y):.1f}")
            pen_is_down = _is_drawn(y)
        return "".join(words)

    def _bands(self) -> Iterator[Markup]:
        """Yield a transparent strip per step, whose title shows the step's values."""
        texts_by_step: dict[float, list[str]] = {}
        for series in self.series:
            if not series.is_dashed:
                for x, y in series.points:
                    texts_by_step.setdefault(x, []).append(f"{series.name} {self.format_value(y)}")
        steps = sorted(texts_by_step)
        steps = steps[:: ceil_div(len(steps), _MOST_BANDS)]
        edges = [_LEFT, *(self._x((a + b) / 2) for a, b in pairwise(steps)), self._right]
        for step, (left, right) in zip(steps, pairwise(edges), strict=True):
            text = "\n".join([f"step {step:,.0f}", *texts_by_step[step]])
            strip = svg.rect(left, _TOP, max(right - left, 0.5), self._bottom - _TOP, "hover")
            yield svg.group(text, [strip])


def downsample_points(points: Sequence[Point], most: int) -> list[Point]:
    """Return at most `most` points that look the same: the lowest and the highest of each stretch."""
    if len(points) <= most:
        return list(points)
    size = ceil_div(2 * len(points), most)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        finite = [point for point in stretch if _is_drawn(point[1])]
        ends = {min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])} if finite else set()
        kept += sorted(ends) if ends else stretch[:1]
    return kept
