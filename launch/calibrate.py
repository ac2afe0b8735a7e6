"""`shoestring calibrate`: what this machine takes for the parts of a run, as a cluster that the planner prices with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..comm.refusal import Problem, Refused
from .compose import compose_run
from .planner.tables import Row, write_table
from .rank_environment import rank_environment

_SECONDS = 600


def calibrate(overrides: Sequence[str], config_dir: Path | None, folder: Path, ranks: int, repeats: int) -> Path:
    """Measure the model of the run that `overrides` describe on `ranks` processes; returns the cluster's YAML file.

    `folder` then serves as `--config-dir FOLDER` with `cluster=measured`. On the CPU; GPUs are priced by a table of
    their kernels.
    """
    problems = []
    if ranks < 1:
        problems.append(Problem("--ranks", ranks, "must be at least 1"))
    if repeats < 1:
        problems.append(Problem("--repeats", repeats, "must be at least 1"))
    if problems:
        raise Refused(problems)
    compose_run(overrides, config_dir)
    described = json.dumps([list(overrides), None if config_dir is None else str(config_dir.absolute())])
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "rows.json"
        torchrun = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--local-addr=localhost",
            f"--nproc-per-node={ranks}",
        ]
        rank = ["-m", "shoestring.launch.calibrate_rank", described, str(output), str(repeats)]
        done = subprocess.run([sys.executable, *torchrun, *rank], env=rank_environment(), timeout=_SECONDS, check=False)
        if done.returncode:
            raise RuntimeError(f"the ranks failed; torchrun exited with {done.returncode}; their words are above")
        rows = [Row(**row) for row in json.loads(output.read_text())]
    return _write(folder.absolute(), rows, ranks)


def _write(folder: Path, rows: Sequence[Row], ranks: int) -> Path:
    (folder / "cluster").mkdir(parents=True, exist_ok=True)
    table, cluster = folder / "measured.csv", folder / "cluster" / "measured.yaml"
    write_table(table, rows)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks / 1e9
    cluster.write_text(
        "# Written by `shoestring calibrate`.\n"
        "name: measured\n"
        "peak_tflops: 1.0\n"
        f"memory_gb: {memory:.3f}\n"
        "nodes: 1\n"
        f"gpus_per_node: {ranks}\n"
        f"tables: {table}\n"
        "sources:\n"
        '  peak_tflops: "assumed: a unit, so that utilisation reads as TFLOPS"\n'
        '  memory_gb: "measured: this machine\'s memory over its ranks"\n'
        '  tables: "measured: shoestring calibrate on this machine"\n'
    )
    return cluster
