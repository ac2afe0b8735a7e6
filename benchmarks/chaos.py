"""Faults injected into small runs, and checks of exit codes, bitwise equal later losses, and the ledger's sum.

    python benchmarks/chaos.py [--only H3 M5 ...] [--json FILE]

Each row injects one fault into a run of 60 steps on one process or two (ep 2), and afterwards repeats the command
without the fault until it exits with 0. Losses and gradient norms of all steps must equal those of an undisturbed run,
and in the ledger allocated time must be productive + rolled back + buckets + unattributed. Rows of one name are
variants of one fault; the first is the fault as it was first observed. Rows with a full disk mount a tmpfs, which needs
root; without it they are skipped. Exit code 1 if a row is not as expected.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shoestring.benchmarks.faults.bench import Bench, Row, open_bench, prepare_data
from shoestring.benchmarks.faults.inject import INJECTIONS, Injection


def measure(only: Sequence[str], root: Path) -> list[Row]:
    """Inject all faults, or those with the names `only`, one after the other."""
    prepare_data(root)
    benches: dict[int, Bench] = {}
    rows = []
    for number, each in enumerate(INJECTIONS):
        if only and each.name not in only:
            continue
        if each.ep not in benches:
            print(f"undisturbed run, ep {each.ep} ...", file=sys.stderr, flush=True)
            benches[each.ep] = open_bench(root, each.ep)
        row = injected(each, benches[each.ep], root / f"row{number}")
        rows.append(row)
        outcome = row.skipped or ("as expected" if not row.wrong else "; ".join(row.wrong))
        print(f"{row.name} ep {row.ep} {row.fault}: {outcome} ({row.seconds:.0f} s)", file=sys.stderr, flush=True)
    return rows


def injected(each: Injection, bench: Bench, place: Path) -> Row:
    """Inject one fault in the folder `place`; return its row."""
    row = Row(each.name, each.fault, each.expected, each.ep)
    if each.needs_root and os.geteuid() != 0:
        row.skipped = "needs root, for a tmpfs"
        return row
    place.mkdir()
    start = time.perf_counter()
    try:
        each.inject(bench, row, place)
    except Exception as error:  # continue with the other rows
        row.wrong.append(f"the injection failed: {error!r}"[:300])
    row.seconds = round(time.perf_counter() - start, 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="names of the rows to run")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as root:
        rows = measure(options.only, Path(root))
    table = Table("row", "ep", "fault", "expected", "exit codes", "s", "found", box=None)
    for row in rows:
        found = row.skipped or ("; ".join(word[:80] for word in row.wrong) if row.wrong else "as expected")
        codes = ", ".join(map(str, row.codes))
        table.add_row(row.name, str(row.ep), row.fault, row.expected, codes, f"{row.seconds:.0f}", found)
    Console(width=180, markup=False).print(table)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    sys.exit(any(row.wrong for row in rows))


if __name__ == "__main__":
    main()
