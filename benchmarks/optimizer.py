"""A data-parallel training step with Shoestring's sharded optimizer, beside torch's two ways to shard.

    python benchmarks/optimizer.py [--ranks 2] [--json FILE]      a gloo process for each rank, one thread each

All run in the same processes, in turns, on the same model and batches: forward, backward of a few micro-batches,
reduction, clipping, AdamW, weights whole again. The figure is the median of the ratios of neighbouring runs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from shoestring.benchmarks.optimizer_peers import RUNNERS, Runner, Sizes
from shoestring.tests.processes import World, run_processes

SIZES = (
    Sizes(width=384, blocks=8, rows=64, micro_batches=2),
    Sizes(width=128, blocks=8, rows=256, micro_batches=4),
)
RUNS = 15


def seconds(runner: Runner) -> float:
    """Of the slowest rank."""
    dist.barrier()
    began = time.perf_counter()
    runner.step()
    own = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
    dist.all_reduce(own, dist.ReduceOp.MAX)
    return float(own)


def compare(world: World, sizes: Sizes, runs: int) -> dict[str, dict[str, float]]:
    """Of each: median seconds, median ratio to ours, and how far its weights are from ours after three steps."""
    runners = {name: make(sizes, world.rank, world.size) for name, make in RUNNERS.items()}
    for runner in runners.values():
        for _ in range(3):
            runner.step()
    weights = {name: runner.weights() for name, runner in runners.items()}
    names = list(runners)
    ours = weights[names[0]]
    times: list[dict[str, float]] = []
    for run in range(runs):
        order = names[run % len(names) :] + names[: run % len(names)]
        times.append({name: seconds(runners[name]) for name in order})
    for runner in runners.values():
        runner.close()
    return {
        name: {
            "seconds": median(found[name] for found in times),
            "ratio": median(found[name] / found[names[0]] for found in times),
            "difference": max(float((weights[name][key] - ours[key]).abs().max()) for key in ours),
        }
        for name in names
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    console, rows = Console(width=120), list[dict[str, Any]]()
    for sizes in SIZES:
        found = run_processes(options.ranks, compare, sizes, RUNS, timeout=600)[0]
        rows.append({"sizes": str(sizes), "figures": found})
        parameters = 8 * sizes.width**2 * sizes.blocks / 1e6
        title = f"{parameters:.1f} M parameters, {options.ranks} ranks, {sizes.micro_batches} x {sizes.rows} rows"
        table = Table(title=title, title_justify="left")
        for heading in ("", "step, ms", "to ours", "largest difference of a weight"):
            table.add_column(heading, justify="right" if heading else "left")
        for name, figures in found.items():
            times = (f"{1e3 * figures['seconds']:.0f}", f"{figures['ratio']:.2f}")
            table.add_row(name, *times, f"{figures['difference']:.1e}")
        console.print(table)
    if options.json is not None:
        machine = {"cores": os.cpu_count(), "torch": torch.__version__, "load": os.getloadavg()[0]}
        options.json.write_text(json.dumps({"machine": machine, "ranks": options.ranks, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
