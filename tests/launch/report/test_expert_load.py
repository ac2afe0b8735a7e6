"""The load of experts as a heat map."""

import re
from xml.etree import ElementTree

import numpy as np

from shoestring.launch.report.expert_load import MAX_COLUMNS, heat_map

SVG = "{http://www.w3.org/2000/svg}"


def cells(picture: str) -> list[list[float]]:
    """Return the opacity of each cell by row: negative below the mean, positive above, 0 where nothing is drawn."""
    root = ElementTree.fromstring(picture)
    columns, rows = (int(size) for size in root.attrib["viewBox"].split()[2:])
    found = np.zeros((rows, columns))
    for path in root.iter(f"{SVG}path"):
        shade = float(path.attrib["stroke-opacity"]) * {"c1": -1, "c2": 1}[path.attrib["class"]]
        x = y = 0
        for right, down, length in re.findall(r"m(-?\d+) (-?\d+)h(\d+)", path.attrib["d"]):
            x, y = x + int(right), y + int(down)
            assert not found[y, x : x + int(length)].any()
            found[y, x : x + int(length)] = shade
            x += int(length)
    return found.tolist()


def test_a_row_is_an_expert_and_its_shade_the_load() -> None:
    rows = cells(heat_map([[10, 10, 10, 10], [0, 5, 10, 65], [10, 20, 40, 10]], "load"))
    assert [row[0] for row in rows] == [0, 0, 0, 0]  # the mean is clear
    assert [row[1] for row in rows] == [-1, -1, -0.5, 0.75]
    assert [row[2] for row in rows] == [-0.5, 0, 0.5, -0.5]  # half the mean, and twice it, half of the way


def test_neighboring_cells_of_one_shade_are_one_line() -> None:
    picture = heat_map([[10, 40, 10]] * 5, "load")
    assert re.findall(r' d="([^"]*)"', picture) == ["m0 0h5m-5 2h5", "m0 1h5"]
    assert [row.count(row[0]) for row in cells(picture)] == [5, 5, 5]


def test_more_moments_than_columns_are_averaged() -> None:
    rows = cells(heat_map([[1, 3], [3, 1]] * MAX_COLUMNS, "load"))
    assert rows == [[0] * MAX_COLUMNS] * 2


def test_a_step_without_tokens_is_clear() -> None:
    assert cells(heat_map([[0, 0]], "load")) == [[0], [0]]
