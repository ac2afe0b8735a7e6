"""AdamW moments in BF16 and FP32: losses of the quickstart with equal seeds and data (report §3.3.2).

    python benchmarks/moments.py [--seeds 1 2 3] [--steps 300] [--override KEY=VALUE …] [--json FILE]

Three runs per seed, each on one process with one thread: moments in BF16; in FP32; and in FP32 with micro-batches of
another size, which adds in another order and so shows the effect of rounding alone. The figures are the
losses on the validation text after the last step; the mean over seeds should lie within 0.5 %. Needs prepared data
(`./launch/quickstart.sh`).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

LIMIT = 0.005
TOKENS_PER_STEP = 16 * 128  # of the quickstart
WAYS = {
    "bf16": ["optimizer.moments=bfloat16"],
    "fp32": ["optimizer.moments=float32"],
    "fp32, rounded otherwise": ["optimizer.moments=float32", "schedule.micro_batch_size=4"],
}
ONE_PROCESS = ["topology=single", "schedule=1f1b", "schedule.micro_batch_size=2"]


def train(directory: Path, seed: int, steps: int, overrides: list[str]) -> float:
    """Run `shoestring train`; return the validation loss after its last step, in nats/token."""
    quiet = ["telemetry.wandb.mode=disabled", "training.sample_tokens=0", "training.checkpoint_every=0"]
    length = [f"training.tokens={steps * TOKENS_PER_STEP}", f"training.evaluate_every={steps}", f"training.seed={seed}"]
    command = [sys.executable, "-m", "shoestring.launch.cli", "train", "experiment=quickstart"]
    command += [*ONE_PROCESS, *quiet, *length, f"training.run_dir={directory}", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    events = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    (loss,) = (event["loss"] for event in events if event["kind"] == "evaluation" and event["step"] == steps)
    return float(loss)


def measure(seeds: list[int], steps: int, overrides: list[str]) -> list[dict[str, Any]]:
    """Return the losses by seed and variant; as many runs at a time as there are cores."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = {
            (seed, way): pool.submit(train, Path(folder) / f"{seed}_{way[-3:]}_{number}", seed, steps, overrides + own)
            for seed in seeds
            for number, (way, own) in enumerate(WAYS.items())
        }
        return [{"seed": seed, **{way: runs[seed, way].result() for way in WAYS}} for seed in seeds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--override", action="append", default=[], help="override of the quickstart's configuration")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    rows = measure(options.seeds, options.steps, options.override)
    table = Table(title=f"Validation loss after {options.steps} steps", title_justify="left")
    for heading in ("seed", *WAYS, "bf16 / fp32", "rounding alone"):
        table.add_column(heading, justify="right")
    differences: dict[str, list[float]] = {"bf16": [], "fp32, rounded otherwise": []}
    for row in rows:
        for way, found in differences.items():
            found.append(row[way] / row["fp32"] - 1)
        table.add_row(
            str(row["seed"]), *(f"{row[way]:.4f}" for way in WAYS), *(f"{d[-1]:+.2%}" for d in differences.values())
        )
    table.add_row("mean", *[""] * len(WAYS), *(f"{fmean(found):+.2%}" for found in differences.values()))
    Console(width=120).print(table)
    if options.json is not None:
        machine = {"cores": os.cpu_count(), "torch": torch.__version__}
        described = {"steps": options.steps, "overrides": options.override, "rows": rows}
        means = {way: fmean(found) for way, found in differences.items()}
        options.json.write_text(json.dumps({"machine": machine, **described, "mean": means}, indent=1) + "\n")
    if abs(fmean(differences["bf16"])) > LIMIT:
        sys.exit(f"BF16 moments are not within {LIMIT:.1%} of FP32 ones")


if __name__ == "__main__":
    main()
