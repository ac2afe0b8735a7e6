"""`shoestring report`: write the HTML report of a run."""

from __future__ import annotations

from pathlib import Path

from ...comm.errors import ConfigError, Problem
from ..report.page import html_report
from ..report.run_record import read_run_record

REPORT_FILE = "report.html"


def write_report(run_dir: Path, out: Path | None) -> Path:
    """Write the report of the run in `run_dir` and return its path. Raises `ConfigError`."""
    page = html_report(read_run_record(run_dir))
    path = run_dir / REPORT_FILE if out is None else out
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError([Problem("--out", str(path), f"cannot be written: {error.strerror}")]) from None
    return path
