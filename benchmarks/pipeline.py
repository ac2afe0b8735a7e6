"""Shoestring's executor compared with torch.distributed.pipelining on the same stages: gradients and step times.

    python benchmarks/pipeline.py [--ranks 2] [--json FILE]      one gloo process per rank, with one thread

A step is the forward and backward of one batch. Both run interleaved in the same processes; the figure is the median of
the ratios of neighboring runs.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from shoestring.benchmarks.pipeline_peers import PEERS, Sizes, ours, theirs
from shoestring.tests.processes import World, run_processes

SIZES = (
    Sizes(width=512, rows=128, micro_batches=8, layers_per_stage=2),
    Sizes(width=256, rows=32, micro_batches=8, layers_per_stage=1),
)
RUNS = 41


def seconds(step: Callable[[], None]) -> float:
    """Return the seconds of the slowest rank."""
    dist.barrier()
    began = time.perf_counter()
    step()
    own = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
    dist.all_reduce(own, dist.ReduceOp.MAX)
    return float(own)


def compare(world: World, name: str, sizes: Sizes, runs: int) -> dict[str, float]:
    """Return the medians of both and of their ratio, and the largest difference of a gradient."""
    mine, peer = ours(PEERS[name][0], sizes, world.rank, world.size), theirs(name, sizes, world.rank, world.size)
    mine.step()
    peer.step()
    expected = peer.gradients()
    difference = max(float((grad - expected[key]).detach().abs().max()) for key, grad in mine.gradients().items())
    largest = max(float(grad.abs().max()) for grad in expected.values())
    times = []
    for run in range(runs):
        order = (mine, peer) if run % 2 else (peer, mine)
        found = {id(each): seconds(each.step) for each in order}
        times.append((found[id(mine)], found[id(peer)]))
        mine.gradients(), peer.gradients()
    mine.close()
    return {
        "ours": median(t[0] for t in times),
        "theirs": median(t[1] for t in times),
        "ratio": median(t[0] / t[1] for t in times),
        "difference": difference / largest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    table = Table(title=f"One step on {options.ranks} ranks", title_justify="left")
    headings = (
        "ours",
        "torch's",
        "width x rows x micro-batches",
        "ours, ms",
        "torch's, ms",
        "ours / torch's",
        "gradients",
    )
    for heading in headings:
        table.add_column(heading)
    rows: list[dict[str, Any]] = []
    for name, (schedule, _) in PEERS.items():
        for sizes in SIZES:
            found = run_processes(options.ranks, compare, name, sizes, RUNS, timeout=300)[0]
            rows.append({"ours": schedule, "torch": name, "sizes": str(sizes)} | {"figures": found})
            table.add_row(
                schedule,
                name,
                f"{sizes.width} x {sizes.rows} x {sizes.micro_batches}",
                *(f"{1e3 * found[key]:.1f}" for key in ("ours", "theirs")),
                f"{found['ratio']:.3f}",
                f"differ by {found['difference']:.0e} of the largest",
            )
    Console(width=140).print(table)
    if options.json is not None:
        machine = {"cores": os.cpu_count(), "torch": torch.__version__, "load": os.getloadavg()[0]}
        options.json.write_text(json.dumps({"machine": machine, "ranks": options.ranks, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
