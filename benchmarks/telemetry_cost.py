"""Overhead of logging in the training thread: one step's calls into ledger and telemetry, on an idle machine.

    python benchmarks/telemetry_cost.py --step-ms 611 [--json FILE]

Prints the median of each call, and their sum per step as a share of --step-ms. The ledger of a run
(`shoestring budget`) has the overhead measured inside the run, with all disturbances.
"""

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from shoestring.comm.exchange.permutation import ZERO_TOKEN_COUNTS
from shoestring.comm.traffic import TrafficCounter
from shoestring.launch.compose import compose_run_config
from shoestring.trainer.model.model import router_names
from shoestring.trainer.run.reporter import Reporter
from shoestring.trainer.run.step import StepResult, StepSettings
from shoestring.trainer.run.step_reduction import StepTotals

REPEATS = 200


def median_ms(call: Callable[[int], object]) -> float:
    times = []
    for number in range(1, REPEATS + 1):
        start = time.perf_counter()
        call(number)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(run_dir: Path) -> dict[str, float]:
    """Return the milliseconds of each call, for the quickstart's model."""
    logged = open_reporter(run_dir / "logged", 1)
    found = {"a step that is logged": median_ms(partial(step, logged))}
    silent = open_reporter(run_dir / "silent", REPEATS + 1)
    found["a step that is not"] = median_ms(partial(step, silent))
    found["waiting for data"] = median_ms(partial(stall, silent))
    found["asking the guard"] = median_ms(silent.budget_halt_reason)
    with mock.patch.object(sys, "stdout", io.StringIO()):
        logged.close(REPEATS, "done")
        silent.close(REPEATS, "done")
    return found


def open_reporter(run_dir: Path, log_every: int) -> Reporter:
    overrides = [f"training.run_dir={run_dir}", f"telemetry.log_every={log_every}", "training.tokens=1_000_000_000"]
    config = compose_run_config(["experiment=quickstart", *overrides])
    with mock.patch.object(sys, "stdout", io.StringIO()):
        reporter = Reporter(config, run_dir, "benchmark")
        reporter.report_run(1.0, "cpu", "float32", "blocks")
        reporter.begin_training()
    return reporter


CONFIG = compose_run_config(["experiment=quickstart"])
COUNTS_E = {name: torch.full((CONFIG.model.n_routed_experts,), 1000) for name in router_names(CONFIG.model)}
TOTALS = StepTotals((3.0, 3.1, 1e-4), 1.0, COUNTS_E, {}, ZERO_TOKEN_COUNTS, ())
RESULT = StepResult(3.0, 3.1, 1e-4, 4.0, 1.0, TOTALS, (-0.01, 0.01))


def step(reporter: Reporter, number: int) -> None:
    sent, between_replicas = TrafficCounter(CONFIG.topology, 0), TrafficCounter(CONFIG.topology, 0)
    reporter.report_step(number + 1, RESULT, StepSettings(1e-3, 1.0, 1e-4, 0.3, 1e-3), 0.0, sent, between_replicas)


def stall(reporter: Reporter, number: int) -> None:
    with reporter.charge_time("data_stall"):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step-ms", type=float, required=True, help="milliseconds of a step to compare with")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the numbers to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    table = Table(title=f"Median of {REPEATS} calls, one thread", title_justify="left")
    table.add_column("call")
    table.add_column("ms", justify="right")
    for name, milliseconds in found.items():
        table.add_row(name, f"{milliseconds:.3f}")
    often = found["a step that is not"] + found["waiting for data"] + found["asking the guard"]
    mean = often + 0.1 * (found["a step that is logged"] - found["a step that is not"])
    found["a step on the average, one in ten logged"] = mean
    table.add_section()
    table.add_row("mean step (every tenth is logged)", f"{mean:.3f}")
    if options.json is not None:
        options.json.write_text(json.dumps({"ms": found, "step_ms": options.step_ms}, indent=1) + "\n")
    Console().print(table)
    Console().print(f"{mean / options.step_ms:.2%} of a step of {options.step_ms:g} ms")


if __name__ == "__main__":
    main()
