"""Profile of Shoestring's CPU step: the step of cpu_step.py under torch's profiler, by kind of work.

    python benchmarks/cpu_profile.py [--steps 5] [--json benchmarks/results/cpu_profile.json]

Shares are of the time inside torch's operations on the calling thread. The interpreter's time between operations is in
none; the time of this repository's autograd functions outside operations is under "other".
"""

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from shoestring.benchmarks.cpu_step import DTYPES, ours

KINDS: Mapping[str, tuple[str, ...]] = {
    "products": ("mm", "addmm_", "bmm", "baddbmm_", "_linear_pointwise", "_grouped_mm"),
    "softmax and exp": ("_softmax", "_softmax_backward_data", "exp_", "amax"),
    "copies, casts, joins": ("copy_", "cat", "clone", "fill_", "zero_"),
    "tokens to rows and back": ("index_select", "_embedding_bag_forward_only", "sort", "gather", "scatter_"),
    "element by element": ("mul", "mul_", "add", "add_", "addcmul_", "sub_", "div_", "silu", "silu_backward", "sum"),
    "norm and optimizer": ("_fused_adamw_", "_foreach_mul_", "dot"),
}
"""Operations of each kind, without their namespace. The FP64 copies of the norm are under copies."""


def shares(precision: str, steps: int) -> dict[str, float]:
    """Return the percentage of a step's operation time by kind, after two warm-up steps, and that time."""
    step = ours(DTYPES[precision])
    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    kind_of = {name: kind for kind, names in KINDS.items() for name in names}
    times = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in events:
        times[kind_of.get(event.key.rpartition("::")[2], "other")] += event.self_cpu_time_total
    return {"operations_ms": total / steps / 1000} | {kind: 100 * time / total for kind, time in times.items()}


def main() -> None:
    """Profile both precisions, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = {precision: shares(precision, options.steps) for precision in DTYPES}
    load = os.getloadavg()[0]
    print(f"{torch.get_num_threads()} threads, load {load:.1f}")
    for kind in rows["fp32"]:
        print(f"{kind:24}" + "".join(f"{precision} {row[kind]:7.1f}   " for precision, row in rows.items()))
    if options.json:
        document = {"threads": torch.get_num_threads(), "load": load, "rows": rows}
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
