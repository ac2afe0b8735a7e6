"""A data-parallel training step with Shoestring's sharded optimizer, compared with torch's two sharded optimizers.

    python benchmarks/optimizer.py [--ranks 2] [--json FILE]      one gloo process per rank, with one thread

All run interleaved in the same processes on the same model and batches: forward, backward of a few micro-batches,
reduction, clipping, AdamW, all-gather of weights. The figure is the median of the ratios of neighboring runs.
"""

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


def seconds(runner: Runner) -> tuple[float, float]:
    """Return wall and CPU seconds of the slowest rank; other load does not lengthen the latter."""
    dist.barrier()
    began, busy = time.perf_counter(), time.process_time()
    runner.step()
    own = torch.tensor((time.perf_counter() - began, time.process_time() - busy), dtype=torch.float64)
    dist.all_reduce(own, dist.ReduceOp.MAX)
    return float(own[0]), float(own[1])


def compare(world: World, sizes: Sizes, runs: int) -> dict[str, dict[str, float]]:
    """Return for each the medians of both times, of their ratios to ours, and its weight difference after 3 steps."""
    runners = {name: make(sizes, world.rank, world.size) for name, make in RUNNERS.items()}
    for runner in runners.values():
        for _ in range(3):
            runner.step()
    weights = {name: runner.weights() for name, runner in runners.items()}
    names = list(runners)
    ours = weights[names[0]]
    times: list[dict[str, tuple[float, float]]] = []
    for run in range(runs):
        order = names[run % len(names) :] + names[: run % len(names)]
        times.append({name: seconds(runners[name]) for name in order})
    for runner in runners.values():
        runner.close()
    return {
        name: {
            "seconds": median(found[name][0] for found in times),
            "ratio": median(found[name][0] / found[names[0]][0] for found in times),
            "processor_seconds": median(found[name][1] for found in times),
            "processor_ratio": median(found[name][1] / found[names[0]][1] for found in times),
            "difference": max(float((weights[name][key] - ours[key]).norm() / ours[key].norm()) for key in ours),
        }
        for name in names
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    console, rows = Console(width=120), list[dict[str, Any]]()
    for sizes in SIZES:
        found = run_processes(options.ranks, compare, sizes, RUNS, timeout=600)[0]
        rows.append({"sizes": str(sizes), "figures": found})
        parameters = 8 * sizes.width**2 * sizes.blocks / 1e6
        title = f"{parameters:.1f} M parameters, {options.ranks} ranks, {sizes.micro_batches} x {sizes.rows} rows"
        table = Table(title=title, title_justify="left")
        for heading in ("", "step, ms", "to ours", "processor, ms", "to ours", "largest ‖Δ‖ / ‖ours‖ of a weight"):
            table.add_column(heading, justify="right" if heading else "left")
        for name, figures in found.items():
            times = (f"{1e3 * figures['seconds']:.0f}", f"{figures['ratio']:.2f}")
            busy = (f"{1e3 * figures['processor_seconds']:.0f}", f"{figures['processor_ratio']:.2f}")
            table.add_row(name, *times, *busy, f"{figures['difference']:.1e}")
        console.print(table)
    if options.json is not None:
        machine = {"cores": os.cpu_count(), "torch": torch.__version__, "load": os.getloadavg()[0]}
        options.json.write_text(json.dumps({"machine": machine, "ranks": options.ranks, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
