"""Report of a run: its sections in order."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ... import __version__
from ..answers.blocks import (
    Answer,
    Block,
    ConfigurationBlock,
    Figure,
    FigureRow,
    MarkedText,
    MissingDataNotice,
    PageSection,
    Paragraph,
    PreformattedText,
    Quantity,
    StackedBar,
    TableBlock,
)
from .budget import budget_section, cost_as_dict
from .expert_load import expert_load_section
from .headline import header_lines, headline_cards, run_state
from .incidents import incidents_section
from .loss import loss_section
from .memory import memory_section
from .run_record import RunRecord
from .schedule import schedule_section


def _configuration_section(record: RunRecord) -> Iterator[Block]:
    """Yield the configuration of the last attempt, by group."""
    groups = [(name, list(_flat(tree))) for name, tree in record.config.items() if isinstance(tree, Mapping)]
    yield ConfigurationBlock(groups) if record.config else MissingDataNotice("The configuration is not recorded.")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) and value.isprintable() else json.dumps(value)


_SECTIONS = (
    ("loss", "Loss", loss_section),
    ("budget", "Budget", budget_section),
    ("schedule", "Schedule", schedule_section),
    ("experts", "Expert load", expert_load_section),
    ("memory", "Memory", memory_section),
    ("incidents", "Incidents", incidents_section),
    ("configuration", "Configuration", _configuration_section),
)


def report_answer(record: RunRecord) -> Answer:
    """Return the report of one run: its main figures, then a section for each question."""
    word, style = run_state(record)
    sections = [PageSection(anchor, title, list(blocks(record))) for anchor, title, blocks in _SECTIONS]
    cards = headline_cards(record)
    return Answer(
        title=Path(os.path.realpath(record.run_dir)).name,
        data={
            "version": __version__,
            "state": word,
            "figures": {card.name: asdict(card) for card in cards},
            "ledger": None if record.summary is None else cost_as_dict(record.summary),
            "sections": {
                section.anchor: [values for block in section.blocks if (values := block_values(block)) is not None]
                for section in sections
            },
        },
        sections=sections,
        cards=cards,
        header_lines=list(header_lines(record)),
        state=word,
        state_style=style,
    )


def block_values(block: Block) -> Any:
    """Return the text and the numbers of a block as plain values; None for a picture."""
    match block:
        case Figure() | FigureRow():
            return None
        case TableBlock():
            cells = [[cell.value if isinstance(cell, Quantity) else cell for cell in row.cells] for row in block.rows]
            return {"title": block.title, "headings": list(block.headings), "rows": cells}
        case StackedBar(title, segments):
            return {"title": title, "shares": {segment.name: segment.share for segment in segments}}
        case ConfigurationBlock(groups):
            return {name: dict(values) for name, values in groups}
        case MarkedText(title, spans):
            return {"title": title, "text": "".join(span.text for span in spans)}
        case PreformattedText(title, text):
            return {"title": title, "text": text}
        case Paragraph(text):
            return text
        case MissingDataNotice(text, hint):
            return f"{text} {hint}".rstrip()
