"""CPU seconds, seconds and peak memory of the verbs that read a run, for a very long run.

    python benchmarks/loads.py [--scale 0.1] [--directory DIR] [--json FILE]

At --scale 1 the loads are a ledger of 1,000,000 records, a metrics.jsonl of 1,000,000 lines (2.1 GB) and 1,000
checkpoints; DeepSeek-V3's run has 235,000 steps. Writing them takes minutes and 3 GB. A row without totals reads
a ledger whose snapshot was removed. `resume` is the work of a new attempt on the ledger before its first step.

The limits apply to CPU seconds (user and system, of the verb and its children); wall time is printed too, and includes
the load of other processes. Exit code 1 if a limit is exceeded.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from shoestring.launch.run.run_dir import create_run_dir
from shoestring.trainer.ledger.allocation_journal import AllocationJournal
from shoestring.trainer.ledger.config import BudgetConfig
from shoestring.trainer.ledger.terms import SNAPSHOT_FILE
from shoestring.trainer.ledger.work_journal import WorkJournal
from shoestring.trainer.telemetry.events import METRICS_FILE, CheckpointSaved, LossEvaluated, RunStarted, StepLogged

RECORDS, LINES, CHECKPOINTS = 1_000_000, 1_000_000, 1000
LINE_BYTES = 2100
TENSORS = 2500
BUDGET = BudgetConfig(gpu_hours=1e6)
LIMITS = {"report": 20.0}
LIMIT_SECONDS, LIMIT_MB = 5.0, 500.0

_RUN: dict[str, Any] = {
    "version": "",
    "ranks": 8,
    "device": "cpu",
    "compute_dtype": "float32",
    "linear": "native",
    "attention": "",
    "parameters": 0,
    "active_parameters": 0,
    "flops_per_token": 0.0,
    "mfu_convention": "",
    "peak_tflops": 1.0,
    "peak_source": "",
}
_STEP: dict[str, Any] = {
    "loss": 5.0,
    "mtp_loss": 5.0,
    "balance_loss": 0.0,
    "total_loss": 5.0,
    "learning_rate": 1e-4,
    "grad_norm": 1.0,
    "mtp_loss_scaling_factor": 0.3,
    "router_bias_update_rate": 1e-3,
    "tokens": 0,
    "tokens_per_second": 1e6,
    "tflops": 1.0,
    "mfu": 0.3,
    "gpu_hours": 0.0,
    "budget_share": 0.0,
    "budget_left": 1e6,
    "goodput": 1.0,
    "projected_gpu_hours": None,
    "eta_seconds": 0.0,
}


@dataclass(frozen=True)
class Row:
    """Measurement of one verb on one load."""

    verb: str
    load: str
    cpu_seconds: float
    wall_seconds: float
    peak_mb: float
    exit_code: int
    is_within: bool


def make_ledger(run_dir: Path, records: int) -> None:
    """Write three records per step, as a run does; one attempt resumes from an earlier step."""
    allocation = AllocationJournal(run_dir, ranks=8, attempt="one", budget=BUDGET)
    work = WorkJournal(run_dir, ranks=8, attempt="one", budget=BUDGET)
    work.record_ready()
    step = 0
    for number in range(1, records // 3 + 1):
        step += 1
        work.record_interval("data_stall", 0.0)
        work.record_step(step, 0.0, 4096)
        work.record_interval("telemetry", 0.0)
        if number % 1000 == 0:
            work.record_resume(step - 10)
            step -= 10
    work.close()
    allocation.close(f"{step} steps done")


def make_metrics(run_dir: Path, lines: int) -> None:
    """Write lines as long as those of a model with 16 MoE layers of 32 experts; every hundredth is an evaluation."""
    loads = {f"tokens_per_expert/layer_{layer:02d}": [100 + expert for expert in range(16)] for layer in range(18)}
    run = RunStarted(step=0, time=1.8e9, config={}, total_steps=lines, **_RUN)
    logged = StepLogged(step=1, time=1.8e9, metrics=loads, total_steps=lines, **_STEP)
    with (run_dir / METRICS_FILE).open("w") as file:
        file.write(run.to_json_line() + "\n")
        for step in range(1, lines + 1):
            now = 1.8e9 + step
            loss = 10 / (1 + step / lines)
            line = replace(logged, step=step, time=now, loss=loss, budget_left=1e6 - step).to_json_line()
            file.write(line[:-1] + f', "filler": "{"x" * max(0, LINE_BYTES - len(line) - 14)}"}}\n')
            if step % 100 == 0:
                evaluated = LossEvaluated(step=step, time=now, loss=5.0, targets=640, unigram_entropy=7.0)
                file.write(evaluated.to_json_line() + "\n")
            if step % 1000 == 0:
                file.write(CheckpointSaved(step=step, time=now, path=f"step_{step:08d}").to_json_line() + "\n")


def make_checkpoints(run_dir: Path, number: int) -> None:
    """Write checkpoints that look complete: a tensor file, a manifest of its names, and the marker."""
    from shoestring.trainer.checkpoint.manifest import (  # imports torch, which must not be in the measuring process
        COMPLETE_MARKER_FILE,
        FORMAT_VERSION,
        MANIFEST_FILE,
    )

    piece = ["part_00000.safetensors", 8, 0, 0, "0" * 64]
    name = "model/layers.{0}.experts.gate_up/expert_{0:04d}"
    tensors = {name.format(index): ["F32", [0], [piece]] for index in range(TENSORS)}
    config = {"topology": {"pp": 1, "edp": 1, "ep": 1}, "model": {}}
    for step in range(1, number + 1):
        folder = run_dir / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "part_00000.safetensors").write_bytes(b" " * 8)
        tree = {"format": FORMAT_VERSION, "metadata": {"step": step, "config": config}}
        tree |= {"files": {"part_00000.safetensors": 8}, "attachments": [], "tensors": tensors}
        text = json.dumps(tree, separators=(",", ":")).encode()
        (folder / MANIFEST_FILE).write_bytes(text)
        (folder / COMPLETE_MARKER_FILE).write_text(hashlib.sha256(text).hexdigest() + "\n")


RESUME = """
import sys
from pathlib import Path
from shoestring.trainer.ledger.allocation_journal import AllocationJournal
from shoestring.trainer.ledger.config import BudgetConfig
from shoestring.trainer.ledger.summary import ensure_snapshot, summarize_ledger
from shoestring.trainer.ledger.checkpoint_totals import carry_checkpoint_totals
from shoestring.trainer.ledger.work_journal import WorkJournal
run_dir, budget = Path(sys.argv[1]), BudgetConfig(gpu_hours=1e6)
ensure_snapshot(run_dir)
totals = summarize_ledger(run_dir).checkpoint_totals()
allocation = AllocationJournal(run_dir, ranks=8, attempt=sys.argv[2], budget=budget)
work = WorkJournal(run_dir, ranks=8, attempt=sys.argv[2], budget=budget)
carry_checkpoint_totals(work, run_dir, totals)
work.record_resume(summarize_ledger(run_dir).steps_retained)
work.record_ready()
work.ledger.summarize()
work.close()
allocation.close("done")
"""


def run(verb: str, load: str, command: Sequence[str]) -> Row:
    """Run `command`; return CPU time and peak memory of it and its children."""
    print(f"shoestring {verb}, {load} ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    wall, cpu, peak = time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss / 1000
    process.returncode = os.waitstatus_to_exitcode(status)
    within = cpu <= LIMITS.get(verb, LIMIT_SECONDS) and peak <= LIMIT_MB and process.returncode == 0
    return Row(verb, load, round(cpu, 2), round(wall, 2), round(peak, 1), process.returncode, within)


def apart(make: Callable[[Path, int], None], run_dir: Path, number: int) -> None:
    """Write a load in a separate process: memory used by this one would count in the peak memory of its children."""
    print(f"{make.__name__} of {number:,} ...", file=sys.stderr, flush=True)
    process = multiprocessing.get_context("spawn").Process(target=make, args=(run_dir, number))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{make.__name__} exited with {process.exitcode}")


def measure(run_dir: Path, scale: float) -> list[Row]:
    """Measure all verbs on loads of this size."""
    create_run_dir(run_dir)
    records, lines, checkpoints = (max(10, round(scale * full)) for full in (RECORDS, LINES, CHECKPOINTS))
    apart(make_ledger, run_dir, records)
    apart(make_checkpoints, run_dir, checkpoints)
    cli = [sys.executable, "-m", "shoestring.launch.cli"]
    resume = [sys.executable, "-c", RESUME, str(run_dir)]
    ledger = f"{records:,} records"
    rows = [
        run("budget", ledger, [*cli, "budget", str(run_dir)]),
        run("budget --verify", ledger, [*cli, "budget", str(run_dir), "--verify"]),
        run("resume", ledger, [*resume, "two"]),
        run("checkpoint ls", f"{checkpoints:,} checkpoints", [*cli, "checkpoint", "ls", str(run_dir)]),
    ]
    apart(make_metrics, run_dir, lines)
    size = (run_dir / METRICS_FILE).stat().st_size / 1e9
    both = f"{ledger}, {lines:,} lines ({size:.2f} GB)"
    rows += [
        run("watch", both, [*cli, "watch", str(run_dir), "--once"]),
        run("report", both, [*cli, "report", str(run_dir), "--html", str(run_dir / "report.html")]),
    ]
    without = {
        "budget": [*cli, "budget", str(run_dir)],
        "watch": [*cli, "watch", str(run_dir), "--once"],
        "resume": [*resume, "three"],
    }
    for verb, command in without.items():
        (run_dir / SNAPSHOT_FILE).unlink(missing_ok=True)
        rows.append(run(verb, f"{ledger}, without totals", command))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="scale of the loads (default 1)")
    parser.add_argument("--directory", type=Path, help="new directory for the loads (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    directory = options.directory or Path(tempfile.mkdtemp(prefix="loads-"))
    try:
        rows = measure(directory / "run", options.scale)
    finally:
        if options.directory is None:
            shutil.rmtree(directory)
    table = Table(
        *("verb", "load", "CPU s", "wall s", "peak MB", "exit"),
        f"within {LIMIT_SECONDS:g} s of CPU (report 20), {LIMIT_MB:g} MB",
        box=None,
    )
    for row in rows:
        numbers = (f"{row.cpu_seconds:.2f}", f"{row.wall_seconds:.2f}", f"{row.peak_mb:,.0f}", str(row.exit_code))
        table.add_row(row.verb, row.load, *numbers, "yes" if row.is_within else "no")
    console = Console(width=140)
    console.print(table)
    load = os.getloadavg()[0]
    console.print(
        f"The limits apply to CPU seconds; wall time includes the load of other processes (load average {load:.1f})."
    )
    if options.json is not None:
        tree = {
            "scale": options.scale,
            "load_average": load,
            "judged": "cpu_seconds",
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(tree, indent=1) + "\n")
    sys.exit(not all(row.is_within for row in rows))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
