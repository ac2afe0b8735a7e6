"""Curves are to scale and stay small; a heat map has the shade of every load."""

from __future__ import annotations

import base64
import math
import re
import struct
import zlib

import pytest

from shoestring.launch.report.heat import MOST_COLUMNS, heat_map
from shoestring.launch.report.plot import Plot, Series, thin, ticks


def drawn(series: Series) -> list[str]:
    picture = Plot([series], width=174, height=138, from_zero=True).svg()  # 100 by 100 for the curve
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
    kept = thin(points, 800)
    assert len(kept) <= 800
    assert (54_321.0, 99.0) in kept
    picture = Plot([Series("loss", points)]).svg()
    assert picture is not None
    assert len(picture) < 100_000


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [
        (0.0, 196.0, 8, [0, 25, 50, 75, 100, 125, 150, 175]),
        (4.1, 7.9, 5, [5, 6, 7]),
        (-0.02, 0.11, 5, [0, 0.05, 0.1]),
    ],
)
def test_ticks_are_round(low: float, high: float, most: int, expected: list[float]) -> None:
    assert ticks(low, high, most) == pytest.approx(expected)


def pixels(picture: str) -> tuple[list[list[int]], bytes, bytes]:
    """Rows of palette places, the palette and its opacities, out of the PNG inside an image tag."""
    found = re.search(r"base64,([^\"]*)", picture)
    assert found is not None
    data, chunks, place = base64.b64decode(found[1]), dict[bytes, bytes](), 8
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    while place < len(data):
        (length,), kind = struct.unpack_from(">I", data, place), data[place + 4 : place + 8]
        chunks[kind] = data[place + 8 : place + 8 + length]
        assert zlib.crc32(kind + chunks[kind]) == struct.unpack_from(">I", data, place + 8 + length)[0]
        place += 12 + length
    width, height = struct.unpack_from(">II", chunks[b"IHDR"])
    flat = zlib.decompress(chunks[b"IDAT"])
    rows = [list(flat[row * (width + 1) + 1 : (row + 1) * (width + 1)]) for row in range(height)]
    return rows, chunks[b"PLTE"], chunks[b"tRNS"]


def test_a_row_is_an_expert_and_its_shade_the_load() -> None:
    rows, palette, opacity = pixels(heat_map([[10, 10, 10, 10], [0, 5, 10, 65], [10, 20, 40, 10]], "load"))
    shades = [[opacity[place] for place in row] for row in rows]
    assert [row[0] for row in shades] == [0, 0, 0, 0]  # the mean is clear
    assert [row[1] for row in shades] == [255, 255, 128, 223]
    assert shades[0][2] == shades[3][2] == 128  # half the mean, and twice it, half of the way
    assert shades[2][2] == 128
    blue, amber = palette[:3], palette[-3:]
    assert [palette[3 * rows[expert][1] :][:3] for expert in (0, 3)] == [blue, amber]


def test_more_moments_than_columns_are_averaged() -> None:
    rows, _, opacity = pixels(heat_map([[1, 3], [3, 1]] * MOST_COLUMNS, "load"))
    assert len(rows[0]) == MOST_COLUMNS
    assert {opacity[place] for row in rows for place in row} == {0}


def test_a_step_without_tokens_is_clear() -> None:
    rows, _, opacity = pixels(heat_map([[0, 0]], "load"))
    assert {opacity[place] for row in rows for place in row} == {0}
