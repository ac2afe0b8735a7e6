"""Blocks that an answer consists of; terminal.py and page.html render them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup


@dataclass(frozen=True)
class Quantity:
    """Number as it is printed, and as the answer's JSON holds it."""

    value: float
    text: str

    def __str__(self) -> str:
        return self.text


Cell = str | Quantity


def number(value: float, spec: str = ",", unit: str = "", *, scale: float = 1.0) -> Quantity:
    """Format `value * scale` by `spec`; the JSON holds `value`, as in `number(bytes, ",.2f", " GB", scale=1e-9)`."""
    return Quantity(value, f"{value if scale == 1 else value * scale:{spec}}{unit}")


@dataclass(frozen=True)
class Paragraph:
    """Paragraph of text."""

    text: str


@dataclass(frozen=True)
class MissingDataNotice:
    """Notice in the place of data that is missing, with a hint how the next run records it."""

    text: str
    hint: str = ""


@dataclass(frozen=True)
class LegendEntry:
    """Entry of a legend."""

    name: str
    style: str
    """Style class of its color."""
    value: str = ""


@dataclass(frozen=True)
class Figure:
    """Picture with a heading, and the text that stands for it in a terminal."""

    title: str
    picture: Markup | Callable[[], Markup]
    """The picture, or the function that draws it, which only the page calls."""
    legend: Sequence[LegendEntry] = ()
    note: str = ""
    is_wide: bool = False
    """True: the picture keeps its size and scrolls. False: it shrinks to the page."""
    text: str = ""

    @property
    def drawn(self) -> Markup:
        """Picture as SVG."""
        return self.picture if isinstance(self.picture, Markup) else self.picture()


@dataclass(frozen=True)
class FigureRow:
    """Small figures side by side."""

    figures: Sequence[Figure]
    title: str = ""
    legend: Sequence[LegendEntry] = ()


@dataclass(frozen=True)
class BarSegment:
    """Segment of a stacked bar."""

    name: str
    share: float
    style: str


@dataclass(frozen=True)
class StackedBar:
    """Stacked bar of shares of a whole; a table after it has the numbers."""

    title: str
    segments: Sequence[BarSegment]


@dataclass(frozen=True)
class TableRow:
    """Row of a table."""

    cells: Sequence[Cell]
    style: str = ""
    """Style class of the color in its first cell; empty: none."""
    is_total: bool = False
    """True: a rule separates it from the row above, and the page prints it bold."""
    begins_group: bool = False
    """True: a rule separates it from the row above."""


@dataclass(frozen=True)
class TableBlock:
    """Table of text and numbers. A column whose cells are quantities, or a dash or empty, is aligned to the right."""

    headings: Sequence[str]
    """Column headings; empty for a table of names and values."""
    rows: Sequence[TableRow]
    title: str = ""
    note: str = ""
    is_collapsed: bool = False
    """True: the page shows it only when it is opened."""

    @property
    def right_aligned_columns(self) -> frozenset[int]:
        """Indices of the columns of numbers."""
        columns = enumerate(zip(*(row.cells for row in self.rows), strict=True))
        return frozenset(
            index
            for index, cells in columns
            if any(isinstance(cell, Quantity) or cell in _DASHES for cell in cells)
            and all(isinstance(cell, Quantity) or cell in ("", *_DASHES) for cell in cells)
        )


_DASHES = ("-", "–")


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[Cell] | TableRow], note: str = "") -> TableBlock:
    """Return a table of plain rows; a `TableRow` among them has a style or is a total."""
    return TableBlock(headings, [row if isinstance(row, TableRow) else TableRow(row) for row in rows], title, note)


@dataclass(frozen=True)
class PreformattedText:
    """Text that is kept as it is, with its control characters."""

    title: str
    text: str


@dataclass(frozen=True)
class TextSpan:
    """Piece of text with a style: `control` for a token that is no text, `masked` for one that is no target."""

    text: str
    style: str = ""


@dataclass(frozen=True)
class MarkedText:
    """Text in which pieces are marked, with its control characters."""

    title: str
    spans: Sequence[TextSpan]


@dataclass(frozen=True)
class ConfigurationBlock:
    """Configuration: (group, its keys and values)."""

    groups: Sequence[tuple[str, Sequence[tuple[str, str]]]]


Block = (
    Paragraph
    | MissingDataNotice
    | Figure
    | FigureRow
    | StackedBar
    | TableBlock
    | PreformattedText
    | MarkedText
    | ConfigurationBlock
)


@dataclass(frozen=True)
class PageSection:
    """Section of an answer; without a title its blocks stand alone."""

    anchor: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class HeadlineCard:
    """Main figure of an answer."""

    name: str
    value: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Answer:
    """Answer to the question that a verb asks."""

    title: str
    data: object
    """JSON document with every number that the blocks show."""
    sections: Sequence[PageSection]
    cards: Sequence[HeadlineCard] = ()
    """Main figures, which come first."""
    header_lines: Sequence[str] = ()
    state: str = ""
    """State of the run that the answer is about."""
    state_style: str = ""
    exit_code: int = 0
    """Exit code of the verb."""

    @staticmethod
    def from_blocks(
        title: str, data: object, blocks: Sequence[Block], cards: Sequence[HeadlineCard] = (), exit_code: int = 0
    ) -> "Answer":
        """Build an answer of one section without a title."""
        return Answer(title, data, [PageSection("", "", blocks)], cards, exit_code=exit_code)


Formats = Mapping[str, Callable[[Any], str]]
"""Format of values by key."""


def records_table(
    title: str,
    headings: Mapping[str, str],
    records: Sequence[Mapping[str, Any]],
    formats: Formats | None = None,
    note: str = "",
) -> TableBlock:
    """Return a table of records of the answer's JSON: `headings` by key, and the formats of keys that need one.

    A number without a format has separators of thousands, a truth value is yes or no, None is a dash.
    """

    def cell(key: str, value: Any) -> Cell:
        shown = (formats or {}).get(key)
        if value is None:
            return "-"
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, str):
            return value if shown is None else shown(value)
        return number(value) if shown is None else Quantity(value, shown(value))

    return table(title, list(headings.values()), [[cell(key, each[key]) for key in headings] for each in records], note)
