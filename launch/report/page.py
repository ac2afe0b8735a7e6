"""Report as one self-contained HTML file."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from ... import __version__
from .blocks import ReportPage
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
    word, style = run_state(record)
    page = ReportPage(
        title=Path(os.path.realpath(record.run_dir)).name,
        state=word,
        state_style=style,
        header_lines=list(header_lines(record)),
        cards=headline_cards(record),
        sections=[section(record) for section in _SECTIONS],
        created_at=datetime.now().astimezone().strftime("%-d %B %Y, %H:%M"),
        version=__version__,
    )
    loader = PackageLoader(__package__, ".")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["block"] = lambda block, name: type(block).__name__ == name
    return environment.get_template("page.html").render(page=page)
