"""A program as a timeline, in text and as SVG: to scale and complete."""

import re
from xml.etree import ElementTree

import pytest

from shoestring.launch.report.timeline import ascii_timeline, svg_timeline
from shoestring.parallelism.pipeline.schedules.registry import SCHEDULES, build_program
from shoestring.parallelism.pipeline.simulate import OpDurations, simulate_program

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("schedule", [each.name for each in SCHEDULES])
def test_svg_has_a_box_for_every_instruction_inside_the_picture(schedule: str) -> None:
    program = build_program(schedule, 4, 12)
    text = svg_timeline(simulate_program(program, OpDurations()), subtitle="F = 1 & more")
    root = ElementTree.fromstring(text)
    titles = [title.text or "" for title in root.iter(f"{SVG}title")]
    assert len(titles) == sum(map(len, program.instructions))
    assert titles[0] == f"rank 0: {program.instructions[0][0]}, 0 to 1"
    words = [text.text for text in root.iter(f"{SVG}text")]
    assert any("bubble" in (word or "") and word.endswith("F = 1 & more") for word in words if word)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for rect in root.iter(f"{SVG}rect"):
        x, y, w, h = (float(rect.attrib.get(name, 0)) for name in ("x", "y", "width", "height"))
        assert w > 0
        assert -0.01 <= x <= x + w <= width + 0.01
        assert -0.01 <= y <= y + h <= height + 0.01


def test_svg_of_a_long_program_stays_readable_and_of_a_paper_s_width() -> None:
    root = ElementTree.fromstring(svg_timeline(simulate_program(build_program("dualpipe", 16, 120), OpDurations())))
    assert float(root.attrib["width"]) < 3000


def test_svg_gives_in_flight_and_bubble_a_column() -> None:
    root = ElementTree.fromstring(svg_timeline(simulate_program(build_program("1f1b", 4, 8), OpDurations())))
    words = [text.text for text in root.iter(f"{SVG}text")]
    assert words[words.index("chunks, peak") + 1 :][:4] == ["4", "3", "2", "1"]
    assert words[words.index("bubble") + 2 :][:4] == ["9"] * 4


def test_ascii_is_to_scale() -> None:
    assert ascii_timeline(simulate_program(build_program("1f1b", 2, 2), OpDurations())).splitlines() == [
        "1f1b: 2 ranks, 2 micro-batches",
        "rank 0 |F0 F1 ......B0--- ...B1--- | bubble 3, in flight 2",
        "rank 1 |...F0 B0--- F1 B1--- ......| bubble 3, in flight 1",
        "makespan 9, bubble 33.3 % of the ranks' time",
    ]


def test_ascii_distinguishes_chunks() -> None:
    two = ascii_timeline(simulate_program(build_program("dualpipe", 2, 4), OpDurations()))
    assert "|F0 f0 F1 b0--- f1B0---- " in two
    three = ascii_timeline(simulate_program(build_program("interleaved", 1, 1, 3), OpDurations()))
    assert "|F0a F0b F0c B0c---- B0b---- B0a---- |" in three


@pytest.mark.parametrize(
    "times", [OpDurations(), OpDurations(1, 1.6, 0.8, forward_backward=2.6), OpDurations(0.3, 0.4, 0.1)], ids=str
)
@pytest.mark.parametrize("schedule", [each.name for each in SCHEDULES])
def test_ascii_rows_are_equally_long_and_name_every_instruction(schedule: str, times: OpDurations) -> None:
    program = build_program(schedule, 4, 12)
    rows = [
        line[line.index("|") : line.rindex("|")]
        for line in ascii_timeline(simulate_program(program, times)).splitlines()[1:-1]
    ]
    assert len({len(row) for row in rows}) == 1
    for row, instructions in zip(rows, program.instructions, strict=True):
        assert len(re.findall(r"[FBIWfbiw][0-9Bb]+[-\w]*", row)) == len(instructions)
