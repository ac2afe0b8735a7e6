"""Answer as one self-contained HTML file."""

from datetime import datetime

from jinja2 import Environment, PackageLoader, StrictUndefined

from ... import __version__
from .blocks import Answer


def html_page(answer: Answer, command: str) -> str:
    """Return the HTML page of an answer; `command` is the command that made it."""
    loader = PackageLoader(__package__, ".")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["block"] = lambda block, name: type(block).__name__ == name
    created_at = datetime.now().astimezone().strftime("%-d %B %Y, %H:%M")
    return environment.get_template("page.html").render(
        page=answer, command=command, version=__version__, created_at=created_at
    )
