"""Every kind of block as terminal text."""

from markupsafe import Markup

from shoestring.launch.answers.blocks import (
    Answer,
    BarSegment,
    Block,
    ConfigurationBlock,
    Figure,
    FigureRow,
    HeadlineCard,
    MissingDataNotice,
    PageSection,
    Paragraph,
    PreformattedText,
    StackedBar,
    TableRow,
    number,
    table,
)
from shoestring.launch.answers.terminal import terminal_text


def test_each_block_is_printed() -> None:
    long = "x" * 70  # wider than the terminal
    figure = Figure("timeline", Markup("<svg/>"), text="rank 0 |FB|")
    blocks: list[Block] = [
        Paragraph("A sentence [not markup]."),
        MissingDataNotice("No cost figures.", "Rank 0 writes the ledger."),
        PreformattedText("Stacks", f"line 1\n{long}"),
        StackedBar("Time", [BarSegment("productive", 0.75, "k1"), BarSegment("idle", 0.25, "k2")]),
        FigureRow([figure]),
        ConfigurationBlock([("training", [("seed", "7")])]),
        table(
            "Sizes",
            ("name", "GB"),
            [("[state]", number(2e9, ".1f", scale=1e-9)), TableRow(("all", "-"), is_total=True)],
        ),
    ]
    cards = [HeadlineCard("step", "17.848", "s", "forecast")]
    answer = Answer("Title", {}, [PageSection("cost", "Cost", blocks)], cards)
    lines = [line.rstrip() for line in terminal_text(answer, width=60, colors=False).splitlines()]
    assert lines == [
        "Title",
        "step: 17.848 s (forecast)",
        "",
        "Cost",
        "A sentence [not markup].",
        "No cost figures. Rank 0 writes the ledger.",
        "Stacks",
        "line 1",
        long,
        "Time",
        "rank 0 |FB|",
        "training.seed=7",
        "Sizes",
        "┏━━━━━━━━━┳━━━━━┓",
        "┃ name    ┃  GB ┃",
        "┡━━━━━━━━━╇━━━━━┩",
        "│ [state] │ 2.0 │",
        "├─────────┼─────┤",
        "│ all     │   - │",
        "└─────────┴─────┘",
    ]


def test_control_codes_of_others_are_shown_as_text() -> None:
    code = "\x1b[2J"
    blocks: list[Block] = [Paragraph(f"5\u00a0ms {code}"), table("", ("name",), [(code,)])]
    text = terminal_text(Answer.from_blocks("Title", {}, blocks), colors=False)
    assert "\x1b" not in text
    assert text.count("\\x1b[2J") == 2
    assert "5\u00a0ms" in text
