"""`shoestring report`: HTML report of a run."""

import argparse
from pathlib import Path

from ..answers.options import print_answer, write_output
from ..console import print_to_stdout

REPORT_FILE = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run directory; the run may still be running")
    parser.add_argument("--html", type=Path, metavar="FILE", help=f"output file (default RUN/{REPORT_FILE})")
    parser.add_argument("--format", choices=["table", "json"], help="also print the report's figures")


def run(options: argparse.Namespace) -> int:
    """Write the report of the run that the options name, and print its figures or where it is."""
    from ..answers.page import html_page
    from ..report.page import report_answer
    from ..report.run_record import read_run_record

    answer = report_answer(read_run_record(options.run_dir))
    options.html = options.html or options.run_dir / REPORT_FILE
    if options.format is not None:
        return print_answer(options, answer)
    write_output(options.html, html_page(answer, "shoestring report"), "--html")
    print_to_stdout(f"Wrote {options.html}")
    return answer.exit_code
