"""Curves as SVG: to scale, interrupted where a value is not finite, and small."""

import math
import re

import pytest

from shoestring.launch.report.plot import Plot, Series, downsample_points


def drawn(series: Series) -> list[str]:
    picture = Plot([series], width=174, height=138, y_axis_from_zero=True).svg()  # 100 by 100 for the curve
    assert picture is not None
    return re.findall(r' d="([^"]*)"', picture)


def test_a_curve_is_to_scale() -> None:
    assert drawn(Series("loss", [(0, 0.0), (50, 13.0), (100, 26.0)])) == ["M58.0 112.0L108.0 63.9L158.0 15.8"]


def test_what_is_not_finite_breaks_the_line() -> None:
    (path,) = drawn(Series("loss", [(0, 1.0), (1, 2.0), (2, math.nan), (3, 2.0), (4, math.inf)]))
    assert re.sub(r"[\d. ]+", "", path) == "MLM"


@pytest.mark.parametrize("points", [[], [(1.0, math.nan)]])
def test_nothing_to_draw_is_no_picture(points: list[tuple[float, float]]) -> None:
    assert Plot([Series("loss", points)]).svg() is None


def test_a_long_run_keeps_its_spikes_and_a_small_picture() -> None:
    points = [(float(step), 3.0) for step in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    kept = downsample_points(points, 800)
    assert len(kept) <= 800
    assert (54_321.0, 99.0) in kept
    picture = Plot([Series("loss", points)]).svg()
    assert picture is not None
    assert len(picture) < 100_000
