"""Answer as text for a terminal or a pipe."""

import io
import sys
from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console, OverflowMethod, RenderableType
from rich.table import Table
from rich.text import Text

from ...comm.errors import escape_unprintable
from .blocks import (
    Answer,
    Block,
    ConfigurationBlock,
    Figure,
    FigureRow,
    MarkedText,
    MissingDataNotice,
    Paragraph,
    PreformattedText,
    StackedBar,
    TableBlock,
)

_MOST_LINED_COLUMNS = 7
_STYLES = {"": "", "control": "bold reverse", "masked": "dim"}
"""Styles of rich for those of `TextSpan`."""


def terminal_text(answer: Answer, *, width: int | None = None, colors: bool | None = None) -> str:
    """Return the answer as text; the defaults of width and colors are those of standard output."""
    drawn, terminal = io.StringIO(), sys.stdout.isatty() if colors is None else colors
    console = Console(file=drawn, force_terminal=terminal or None, markup=False, width=width)
    if answer.cards:
        console.print(answer.title, style="bold")
    for card in answer.cards:
        console.print(" ".join(filter(None, (f"{card.name}:", card.value, card.unit, card.note and f"({card.note})"))))
    for section in answer.sections:
        if section.title:
            console.print(f"\n{section.title}", style="bold")
        for block in section.blocks:
            for part in _parts(block):
                if isinstance(part, PreformattedText):
                    drawn.write(f"{part.text}\n")  # rich would wrap its lines
                else:
                    console.print(_escaped(part) if isinstance(part, str) else part)
    return drawn.getvalue().removesuffix("\n")


def _parts(block: Block) -> Iterator[RenderableType | PreformattedText]:
    match block:
        case TableBlock():
            yield _table(block)
            if block.note:
                yield block.note
        case Paragraph(text):
            yield text
        case MissingDataNotice(text, hint):
            yield f"{text} {hint}".rstrip()
        case PreformattedText(title):
            yield from filter(None, (title,))
            yield block
        case MarkedText(title, spans):
            yield title
            yield Text.assemble(*((_escaped(span.text), _STYLES[span.style]) for span in spans))
        case StackedBar(title):
            yield title  # the table after it has the shares
        case Figure():
            yield from [PreformattedText("", block.text)] * bool(block.text)
        case FigureRow(figures):
            for figure in figures:
                yield from _parts(figure)
        case ConfigurationBlock(groups):
            yield from (f"{name}.{key}={value}" for name, values in groups for key, value in values)


def _table(block: TableBlock) -> Table:
    drawn = Table(title=block.title or None, title_justify="left", show_header=bool(block.headings))
    columns = len(block.headings) or max((len(row.cells) for row in block.rows), default=0)
    if columns > _MOST_LINED_COLUMNS:  # lines between them would take a third of a narrow terminal
        drawn.box, drawn.padding, drawn.pad_edge, drawn.show_edge = SIMPLE_HEAD, (0, 1, 0, 0), False, False
    for index in range(columns):
        heading = block.headings[index] if block.headings else ""
        is_number = index in block.right_aligned_columns
        # A long word, such as a path, is folded; of a number that does not fit an ellipsis must say so.
        overflow: OverflowMethod = "ellipsis" if is_number else "fold"
        drawn.add_column(heading, justify="right" if is_number else "left", overflow=overflow)
    for row in block.rows:
        if row.is_total or row.begins_group:
            drawn.add_section()
        drawn.add_row(*(_escaped(str(cell)) for cell in row.cells))
    return drawn


def _escaped(text: str) -> str:
    """Escape control characters of messages and names, which may come from other people."""
    return escape_unprintable(text, keep="\n\t\u00a0")
