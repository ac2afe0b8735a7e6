"""Share of the all-to-alls that is overlapped when the forward of one micro-batch runs with the backward of another.

    python benchmarks/overlap.py [--json FILE] [--trace FILE]      needs root, for simulated nodes

Two nodes of one rank, one core each, experts on both, DualPipeV on a pipeline of one rank: every FB is measured
interleaved and with the forward first, in neighboring steps. The uplinks are set so that all-to-alls take nearly as
long as computation. Then four nodes, with a pipeline of two ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from shoestring.launch.bench.bench_exchange import run_ranks_on_simulated_cluster

MODULE = "shoestring.benchmarks.overlap_rank"
TRIES = 4
BALANCE = 1.15
"""Target ratio of computation to all-to-all time; figures are valid from 0.8 to 1.25, and include the ratio."""


def run(nodes: int, pp: int, pairs: int, uplink: str, folder: Path) -> list[dict[str, Any]]:
    """Run the benchmark; return the figures of every rank."""
    run_ranks_on_simulated_cluster(nodes, 1, uplink, ["-m", MODULE, str(pp), str(pairs), str(folder)])
    found: list[dict[str, Any]] = json.loads((folder / "figures.json").read_text())
    return found


def balanced(nodes: int, pp: int, pairs: int, folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """Find the uplink at which computation takes `BALANCE` times as long as all-to-alls; return it with its figures.

    The first guess comes from the bytes and the computation on fast links; each run corrects it.
    """
    free = run(nodes, pp, 2, "10gbit", folder / "free")
    sent = max(rank["bytes_between_nodes"] for rank in free)
    mbit = BALANCE * 8 * sent / mean(rank["serial"]["compute"] for rank in free) / 1e6
    for attempt in range(TRIES):
        uplink = f"{max(1, round(mbit))}mbit"
        found = run(nodes, pp, pairs, uplink, folder / f"try{attempt}")
        balance = mean(rank["serial"]["compute"] / rank["serial"]["exchange"] for rank in found)
        print(f"uplinks of {uplink}: computation / all-to-all {balance:.2f}", flush=True)
        if abs(balance - BALANCE) < 0.1:
            break
        mbit *= BALANCE / balance
    return uplink, found


def show(title: str, found: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    headings = ("rank", "FB in turns, ms", "F then B, ms", "ratio", "compute : exchange", "exposed of FB")
    for heading in headings:
        table.add_column(heading, justify="right")
    for number, rank in enumerate(found):
        turns, serial = rank["turns"], rank["serial"]
        share = f"{serial['compute'] / serial['exchange']:.2f}"
        times = (f"{1e3 * each['FB']:.0f}" for each in (turns, serial))
        table.add_row(str(number), *times, f"{rank['ratio']:.3f}", share, f"{100 * rank['exposed']:.1f} %")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--trace", type=Path, help="write the timeline of the last interleaved step to this file")
    options = parser.parse_args()
    console = Console(width=120)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        uplink, results["two nodes"] = balanced(2, 1, options.pairs, folder)
        console.print(show(f"FBs of one step, 2 nodes x 1 rank, uplinks of {uplink}", results["two nodes"]))
        if options.trace is not None:
            shutil.copy(max(folder.glob("try*")) / "trace.json", options.trace)
        results["four nodes"] = run(4, 2, 3, uplink, folder / "four")
        console.print(
            show(f"FBs of one step, 4 nodes x 1 rank, pp 2 x ep 2, uplinks of {uplink}", results["four nodes"])
        )
    if options.json is not None:
        machine = {"cores": os.cpu_count(), "torch": torch.__version__, "load": os.getloadavg()[0]}
        options.json.write_text(json.dumps({"machine": machine, "uplink": uplink} | results, indent=1))


if __name__ == "__main__":
    main()
