"""Time that steps wait for gradient reduction and parameters, with and without overlap.

    python benchmarks/gradient_sync_wait.py [--steps 40] [--json FILE]

The quickstart on its four processes, and its model on two replicas, each twice from the same seed, interleaved:
unchanged, and with every bucket reduced after the program's end and a wait for all weights before the first. The
figures come from the ledger, over all steps and ranks. Needs prepared data (`./launch/quickstart.sh`) and an idle
machine.
"""

import argparse
import json
import os
import sys
import tempfile
from contextlib import ExitStack, redirect_stdout
from datetime import timedelta
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from shoestring.comm.groups import ProcessGroups
from shoestring.comm.trace import GRADIENT_SYNC_WAIT, TimelineTrack
from shoestring.launch.compose import compose_run_config
from shoestring.parallelism.zero.optimizer import ShardedOptimizer
from shoestring.parallelism.zero.reduce import GradientReducer
from shoestring.tests.processes import World, run_processes
from shoestring.trainer.build import build_stage_layout
from shoestring.trainer.ledger.summary import summarize_ledger
from shoestring.trainer.loop import train

LAYOUTS = {
    "pp 2 x ep 2, DualPipeV": [],
    "edp 2, 1F1B": [
        "topology.pp=1",
        "topology.ep=1",
        "topology.edp=2",
        "schedule=1f1b",
        "schedule.micro_batch_size=2",
    ],
}
ROUNDS = 3


def one_after_the_other(stack: ExitStack) -> None:
    """Reduce after the program's end, and all-gather all weights before its start."""
    step = ShardedOptimizer.step

    def step_and_wait(self: ShardedOptimizer, rate: float, factor: float = 1.0) -> None:
        step(self, rate, factor)
        with self._recorder.span(TimelineTrack.INSTRUCTION, GRADIENT_SYNC_WAIT):
            self.wait_for_weights()

    stack.enter_context(patch.object(GradientReducer, "after_instruction", lambda self, instruction: None))
    stack.enter_context(patch.object(ShardedOptimizer, "step", step_and_wait))


def run(world: World, overrides: list[str], overlap: bool) -> None:
    torch.set_num_threads(1)
    config = compose_run_config(["experiment=quickstart", *overrides])
    groups = ProcessGroups.create(
        config.topology, world.rank, timedelta(seconds=60), build_stage_layout(config).replica_pp_groups()
    )
    with ExitStack() as stack:
        if not overlap:
            one_after_the_other(stack)
        stack.enter_context(redirect_stdout(StringIO()))
        train(config, groups, torch.device("cpu"), "benchmark")


def measure(directory: Path, layout: list[str], steps: int, overlap: bool) -> dict[str, float]:
    """Return milliseconds per step and rank."""
    tokens = steps * 16 * 128
    quiet = ["telemetry.wandb.mode=disabled", "telemetry.terms_every=1", "training.sample_tokens=0"]
    where = [f"training.run_dir={directory}", f"training.tokens={tokens}", "training.evaluate_every=0"]
    overrides = [*layout, "schedule.micro_batch_size=2", *quiet, *where, "training.checkpoint_every=0"]
    ranks = compose_run_config(["experiment=quickstart", *overrides]).topology.world_size
    run_processes(ranks, run, overrides, overlap, timeout=300)
    summary = summarize_ledger(directory)
    per_step = {name: ms / (ranks * steps) for name, ms in summary.gpu_ms_by_term.items()}
    return {"gradient_sync_wait_ms": per_step["gradient_sync_wait"], "step_ms": summary.productive_ms / (ranks * steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    table = Table(title=f"Milliseconds per step and rank, minimum of {ROUNDS} runs of {options.steps} steps")
    for heading in ("layout", "", "gradient_sync_wait", "step"):
        table.add_column(heading)
    rows = []
    for name, layout in LAYOUTS.items():
        found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        for number in range(1, ROUNDS + 1):
            print(f"{name}: round {number} of {ROUNDS}", file=sys.stderr, flush=True)
            for overlap in found:
                with tempfile.TemporaryDirectory() as directory:
                    found[overlap].append(measure(Path(directory) / "run", layout, options.steps, overlap))
        for overlap, runs in found.items():
            least = min(runs, key=lambda each: each["step_ms"])
            way = "during the program" if overlap else "after the program"
            rows.append({"layout": name, "reduced": way, **least})
            table.add_row(name, way, f"{least['gradient_sync_wait_ms']:.1f}", f"{least['step_ms']:.0f}")
    Console(width=100).print(table)
    if options.json is not None:
        machine = {"cores": os.cpu_count(), "torch": torch.__version__, "load": os.getloadavg()[0]}
        options.json.write_text(json.dumps({"machine": machine, "steps": options.steps, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
