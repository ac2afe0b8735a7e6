"""What of this machine works: one script for one GPU, one node and several nodes.

    python benchmarks/bring_up.py --json benchmarks/results/NAME.json                           one process
    torchrun --standalone --nproc-per-node=8 benchmarks/bring_up.py --json ...                  one node
    torchrun --nnodes=2 --node-rank=... --master-addr=... --nproc-per-node=8 benchmarks/bring_up.py ...

Every row is tried on every rank and says `works` with figures, `not here` with what is missing, or `fails` with the
reason; the next row is tried in any case. Exit code 1 where a mandatory row failed. Without a GPU the rows that need
one are `not here`.
Only a table of this script may turn "not yet run on hardware" into "run on ...", for the rows that say `works`.
"""

from __future__ import annotations

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

from shoestring.benchmarks.rows import compute, network, providers, training
from shoestring.benchmarks.rows.row import Machine, Outcome, Verdict, run_check
from shoestring.comm.bootstrap import WorkerEnvironment, start_default_group
from shoestring.comm.groups import Group
from shoestring.comm.open_groups import open_groups_on

CHECKS = (*compute.CHECKS, *network.CHECKS, *training.CHECKS, *providers.CHECKS)
COLLECTIVE = timedelta(minutes=2)
COMPARING = timedelta(minutes=10)
"""Ranks wait this long for each other's outcome: longer than one of them waits in a collective."""


def open_machine() -> Machine:
    """This rank's device, and its groups where torchrun started it."""
    worker = WorkerEnvironment.read()
    local_rank = 0 if worker is None else worker.local_rank
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if worker is None:
        alone = Group((0,), None, 0, COLLECTIVE)
        return Machine(device, alone, alone, alone, None)
    # A collective that times out shall raise, so that its row fails, and not end the process.
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    start_default_group(worker, device, COLLECTIVE)
    size, local = worker.world_size, int(os.environ["LOCAL_WORLD_SIZE"])
    node = [tuple(range(first, first + local)) for first in range(0, size, local)]
    rail = [tuple(range(first, size, local)) for first in range(local)]

    make = open_groups_on(device, worker.rank, COLLECTIVE)

    def mine(name: str, parts: Sequence[tuple[int, ...]]) -> Group:
        several = [ranks for ranks in parts if len(ranks) > 1]
        communicator = make.split(name, several, None) if several else None
        own = next(ranks for ranks in parts if worker.rank in ranks)
        return Group(own, communicator, worker.rank, COLLECTIVE)

    talk = dist.new_group(backend="gloo", timeout=COMPARING)
    return Machine(device, mine("all", [tuple(range(size))]), mine("node", node), mine("rail", rail), talk)


def write_json(path: Path, machine: Machine, outcomes: Sequence[Outcome]) -> None:
    """All rows so far, with every rank's figures."""
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": platform.machine(),
        "device": torch.cuda.get_device_name(machine.device) if machine.on_gpu else "cpu",
        "ranks": machine.world.size,
        "nodes": machine.world.size // machine.node.size,
        "rows": [asdict(outcome) for outcome in outcomes],
    }
    path.write_text(json.dumps(facts, indent=1) + "\n")


def main() -> int:
    """Try every row; return the exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows here too, anew after each of them")
    path: Path | None = parser.parse_args().json
    machine = open_machine()
    torch.manual_seed(machine.world.rank)
    outcomes: list[Outcome] = []
    for check in CHECKS:
        outcomes.append(run_check(check, machine))
        if machine.world.is_first:
            print(outcomes[-1].line(), flush=True)
            if path is not None:
                write_json(path, machine, outcomes)
    failed = [row.name for row in outcomes if row.mandatory and row.verdict is Verdict.FAILS]
    if machine.world.is_first:
        counts = ", ".join(f"{sum(row.verdict is verdict for row in outcomes)} {verdict}" for verdict in Verdict)
        print(f"{len(outcomes)} rows: {counts}" + (f"; mandatory and failed: {', '.join(failed)}" if failed else ""))
    if dist.is_initialized():
        dist.destroy_process_group()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
