"""SVG marks: escaped, in the page's colors in light and dark, with round ticks and legends that fit."""

from xml.etree import ElementTree

import pytest

from shoestring.launch.report import svg

SVG = "{http://www.w3.org/2000/svg}"


def test_colors_are_those_of_the_page_in_light_and_dark() -> None:
    picture = svg.picture(10, 10, [svg.rect(0, 0, 5, 5, "c1"), svg.rect(5, 5, 5, 5, "#f0a830")])
    root = ElementTree.fromstring(picture)
    style = root.findtext(f"{SVG}style") or ""
    light, dark = style.split("@media (prefers-color-scheme:dark)")
    assert f".c1{{color:{svg.LIGHT['c1']}}}" in light
    assert ".c1{color:#7ba6de}" in dark
    assert ".k1" not in style  # no rule of a color that is not used
    assert [(box.get("class"), box.get("fill")) for box in root.iter(f"{SVG}rect")] == [
        ("ground", None),
        ("c1", None),
        (None, "#f0a830"),
    ]


def test_text_and_tooltips_stay_text() -> None:
    words = 'a <b> & "c"'
    root = ElementTree.fromstring(svg.picture(9, 9, [svg.group(words, [svg.text(1, 2, words)])]))
    assert [root.findtext(f".//{SVG}{tag}") for tag in ("title", "text")] == [words, words]


def test_a_legend_begins_a_new_row_where_the_picture_ends() -> None:
    entries = [svg.LegendMark("ten letter", []) for _ in range(3)]
    marks, bottom = svg.legend(0, 50, 220, entries)
    assert [mark.partition("translate(")[2].partition(")")[0].split()[1] for mark in marks] == ["50", "50", "70"]
    assert bottom == 84


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [
        (0.0, 196.0, 8, [0, 25, 50, 75, 100, 125, 150, 175]),
        (4.1, 7.9, 5, [5, 6, 7]),
        (-0.02, 0.11, 5, [0, 0.05, 0.1]),
    ],
)
def test_ticks_are_round(low: float, high: float, most: int, expected: list[float]) -> None:
    assert svg.tick_values(low, high, most) == pytest.approx(expected)
