"""Report of a run: its sections in order."""

from __future__ import annotations

import os
from pathlib import Path

from ..answers.blocks import Answer
from ..answers.page import html_page
from .budget import budget_section
from .configuration import configuration_section
from .expert_load import expert_load_section
from .headline import header_lines, headline_cards, run_state
from .incidents import incidents_section
from .loss import loss_section
from .memory import memory_section
from .run_record import RunRecord
from .schedule import schedule_section

_SECTIONS = (
    loss_section,
    budget_section,
    schedule_section,
    expert_load_section,
    memory_section,
    incidents_section,
    configuration_section,
)


def html_report(record: RunRecord) -> str:
    """Return the HTML page of one run."""
    return html_page(report_answer(record), "shoestring report")


def report_answer(record: RunRecord) -> Answer:
    """Return the report of one run: its main figures, then a section for each question."""
    word, style = run_state(record)
    return Answer(
        title=Path(os.path.realpath(record.run_dir)).name,
        data=None,
        sections=[section(record) for section in _SECTIONS],
        cards=headline_cards(record),
        header_lines=list(header_lines(record)),
        state=word,
        state_style=style,
    )
