"""What a section of a report is made of. page.html says how each looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup


@dataclass(frozen=True)
class Paragraph:
    """A sentence or two."""

    text: str


@dataclass(frozen=True)
class MissingDataNotice:
    """What is not there, said in its place, and how the next run records it."""

    text: str
    hint: str = ""


@dataclass(frozen=True)
class LegendEntry:
    """An entry of a legend."""

    name: str
    style: str
    """Class of its color."""
    value: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture with its heading."""

    title: str
    picture: Markup
    legend: Sequence[LegendEntry] = ()
    note: str = ""
    is_wide: bool = False
    """Whether it keeps its size and scrolls, instead of shrinking to the page."""


@dataclass(frozen=True)
class FigureRow:
    """Small figures side by side."""

    figures: Sequence[Figure]
    title: str = ""
    legend: Sequence[LegendEntry] = ()


@dataclass(frozen=True)
class BarSegment:
    """Of a bar."""

    name: str
    share: float
    style: str


@dataclass(frozen=True)
class StackedBar:
    """A whole, split."""

    title: str
    segments: Sequence[BarSegment]


@dataclass(frozen=True)
class TableRow:
    """Of a table."""

    cells: Sequence[str]
    style: str = ""
    """Class of the color that its first cell shows; none if empty."""
    is_total: bool = False


@dataclass(frozen=True)
class TableBlock:
    """Columns of words, and of numbers."""

    headings: Sequence[str]
    rows: Sequence[TableRow]
    right_aligned_columns: frozenset[int] = frozenset()
    """Columns that are aligned to the right."""
    title: str = ""
    note: str = ""
    is_collapsed: bool = False
    """Whether it is shown only to who asks."""


@dataclass(frozen=True)
class PreformattedText:
    """Text as it is."""

    title: str
    text: str


@dataclass(frozen=True)
class ConfigurationBlock:
    """The configuration: of each group its keys and values."""

    groups: Sequence[tuple[str, Sequence[tuple[str, str]]]]


Block = (
    Paragraph | MissingDataNotice | Figure | FigureRow | StackedBar | TableBlock | PreformattedText | ConfigurationBlock
)


@dataclass(frozen=True)
class PageSection:
    """A part of the page."""

    anchor: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class HeadlineCard:
    """A figure of the headline."""

    name: str
    value: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class ReportPage:
    """All of it."""

    title: str
    state: str
    """In a word."""
    state_style: str
    header_lines: Sequence[str]
    cards: Sequence[HeadlineCard]
    sections: Sequence[PageSection] = field(default_factory=tuple)
    created_at: str = ""
    """When."""
    version: str = ""
    """Of Shoestring, which made it."""
