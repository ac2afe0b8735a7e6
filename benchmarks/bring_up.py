"""Test of which operations work on a machine, from one process to several nodes of GPUs.

    python benchmarks/bring_up.py --json benchmarks/results/NAME.json                           one process
    torchrun --standalone --nproc-per-node=8 benchmarks/bring_up.py --json ...                  one node
    torchrun --nnodes=2 --node-rank=... --master-addr=... --nproc-per-node=8 benchmarks/bring_up.py ...

Every row runs on every rank and prints `works` with figures, `not here` with what is missing, or `fails` with the
reason; the next row runs in any case. Each row has a time limit, at which it is killed and fails. Exit code 1 if a
mandatory row failed. Without a GPU the rows that need one are `not here`.
Docs may replace "not yet run on hardware" by "run on ..." only for rows that print `works`.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from shoestring.benchmarks.rows import attention, compute, exact, fp8, network, providers, training
from shoestring.benchmarks.rows.process import RowProcess
from shoestring.benchmarks.rows.row import Check, Outcome, RankResult, RowStatus, outcome_of
from shoestring.comm.bootstrap import TorchrunEnvironment, init_default_process_group
from shoestring.launch.run.rank_environment import FLIGHT_RECORDER_DIR, applicable_settings, build_rank_environment

CHECKS = (
    *compute.CHECKS,
    *exact.CHECKS,
    *attention.CHECKS,
    *fp8.CHECKS,
    *network.CHECKS,
    *training.CHECKS,
    *providers.CHECKS,
    *fp8.LAST_CHECKS,
)
COMPARING = timedelta(minutes=10)
"""Time to wait for the results of other ranks: longer than the limit of any row."""


def write_json(path: Path, worker: TorchrunEnvironment | None, device: str, outcomes: Sequence[Outcome]) -> None:
    """Write all rows so far, with every rank's figures."""
    place = worker or TorchrunEnvironment(0, 0, 1)
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": platform.machine(),
        "device": device,
        "torch": torch.__version__,
        "ranks": place.world_size,
        "nodes": place.world_size // place.local_world_size,
        "rows": [asdict(outcome) for outcome in outcomes],
    }
    path.write_text(json.dumps(facts, indent=1) + "\n")


def gather_results(worker: TorchrunEnvironment | None, own: RankResult) -> list[RankResult]:
    """Gather the results of all ranks over gloo between the waiting processes, which no row can break."""
    if worker is None:
        return [own]
    gathered = [own] * worker.world_size
    dist.all_gather_object(gathered, own)
    return gathered


def set_environment(worker: TorchrunEnvironment | None, folder: Path) -> None:
    """Set the environment of a rank of a training run; NCCL's flight recorder writes under `folder`."""
    on_gpu = torch.cuda.is_available()
    os.environ.update(build_rank_environment(settings=applicable_settings(folder, on_gpu=on_gpu)))
    if on_gpu and worker is not None:
        (folder / FLIGHT_RECORDER_DIR).mkdir(parents=True, exist_ok=True)


def bring_up(checks: Sequence[Check], path: Path | None) -> int:
    """Run every row; return the exit code."""
    worker = TorchrunEnvironment.read()
    set_environment(worker, Path() if path is None else path.parent)
    prints = worker is None or worker.rank == 0
    if worker is not None:
        init_default_process_group(worker, torch.device("cpu"), COMPARING)
    process, outcomes = RowProcess(worker), []
    for check in checks:
        outcomes.append(outcome_of(check, gather_results(worker, process.run_check(check))))
        if outcomes[-1].status is RowStatus.FAILS:
            process.close()
        if prints:
            print(outcomes[-1].line(), flush=True)
            if path is not None:
                write_json(path, worker, process.device_name, outcomes)
    process.close()
    failed = [row.name for row in outcomes if row.mandatory and row.status is RowStatus.FAILS]
    if prints:
        counts = ", ".join(f"{sum(row.status is status for row in outcomes)} {status}" for status in RowStatus)
        print(f"{len(outcomes)} rows: {counts}" + (f"; mandatory rows failed: {', '.join(failed)}" if failed else ""))
    if worker is not None:
        dist.destroy_process_group()
    return 1 if failed else 0


def main() -> int:
    """Read the arguments and run every row."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the rows to this file, after each row")
    return bring_up(CHECKS, parser.parse_args().json)


if __name__ == "__main__":
    sys.exit(main())
