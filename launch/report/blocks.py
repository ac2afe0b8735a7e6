"""Blocks of a report's sections; page.html renders them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup


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
    """Picture with a heading."""

    title: str
    picture: Markup
    legend: Sequence[LegendEntry] = ()
    note: str = ""
    is_wide: bool = False
    """True: the picture keeps its size and scrolls. False: it shrinks to the page."""


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
    """Stacked bar of shares of a whole."""

    title: str
    segments: Sequence[BarSegment]


@dataclass(frozen=True)
class TableRow:
    """Row of a table."""

    cells: Sequence[str]
    style: str = ""
    """Style class of the color in its first cell; empty: none."""
    is_total: bool = False


@dataclass(frozen=True)
class TableBlock:
    """Table of text and numbers."""

    headings: Sequence[str]
    rows: Sequence[TableRow]
    right_aligned_columns: frozenset[int] = frozenset()
    """Indices of right-aligned columns."""
    title: str = ""
    note: str = ""
    is_collapsed: bool = False
    """True: shown only when it is opened."""


@dataclass(frozen=True)
class PreformattedText:
    """Preformatted text."""

    title: str
    text: str


@dataclass(frozen=True)
class ConfigurationBlock:
    """Configuration: (group, its keys and values)."""

    groups: Sequence[tuple[str, Sequence[tuple[str, str]]]]


Block = (
    Paragraph | MissingDataNotice | Figure | FigureRow | StackedBar | TableBlock | PreformattedText | ConfigurationBlock
)


@dataclass(frozen=True)
class PageSection:
    """Section of the page."""

    anchor: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class HeadlineCard:
    """Main figure of a run."""

    name: str
    value: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class ReportPage:
    """Whole page."""

    title: str
    state: str
    """State of the run."""
    state_style: str
    header_lines: Sequence[str]
    cards: Sequence[HeadlineCard]
    sections: Sequence[PageSection] = field(default_factory=tuple)
    created_at: str = ""
    """Time at which the page was made."""
    version: str = ""
    """Version of Shoestring that made the page."""
