"""One machine's share of `shoestring train` over several machines: launch/torchrun.sh starts it on each of them."""

from __future__ import annotations

import argparse
import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..comm.refusal import Problem, Refused, refuse_if_any
from ..trainer.config import RunConfig
from ..trainer.halt import Halt
from .compose import compose_run
from .launcher import LocalRanks, Stopped, launch, run_torchrun
from .preflight import is_finished, preflight, spent_budget
from .torchrun import local_torchrun

_PORT = 29500
_REFUSED = 2


@dataclass(frozen=True)
class Place:
    """Where this machine stands in the launch, and how the machines find each other."""

    nodes: int
    rank: int
    """Of this machine. Rank 0 of the run lives on machine 0, which speaks for the run: its directory, its ledger."""
    address: str
    """Of machine 0; empty where there is one machine."""
    port: int
    """TCP port on machine 0."""
    processes: int | None
    """Ranks on each machine, where they are given."""

    def torchrun(self, processes: int) -> list[str]:
        """Arguments of torchrun for `processes` ranks on this machine.

        The rendezvous is static: c10d numbers the machines by the order of their addresses, so that neighbours in the
        topology would not be neighbours in the network, and rank 0 could be anywhere.
        """
        if self.nodes == 1:
            return local_torchrun(processes)
        meeting = [f"--master-addr={self.address}", f"--master-port={self.port}"]
        return [f"--nnodes={self.nodes}", f"--node-rank={self.rank}", *meeting, f"--nproc-per-node={processes}"]


def read_place(environment: Mapping[str, str]) -> Place:
    """The machine that the variables of launch/torchrun.sh describe. Raises `Refused` with all that is wrong."""
    problems: list[Problem] = []

    def whole(name: str, default: int, low: int, high: int) -> int:
        text = environment.get(name) or str(default)
        if text.isdecimal() and low <= int(text) <= high:
            return int(text)
        problems.append(Problem(name, text, f"must be a whole number from {low} to {high}"))
        return default

    nodes = whole("NNODES", 1, 1, 100_000)
    rank = whole("NODE_RANK", 0, 0, 100_000)
    port = whole("MASTER_PORT", _PORT, 1, 65535)
    processes = whole("GPUS_PER_NODE", 1, 1, 1024) if environment.get("GPUS_PER_NODE") else None
    address = environment.get("MASTER_ADDR", "")
    if not problems and rank >= nodes:
        problems.append(Problem("NODE_RANK", rank, f"must be less than NNODES = {nodes}: machines count from 0"))
    if nodes > 1 and not environment.get("NODE_RANK"):
        problems.append(Problem("NODE_RANK", "", "is missing; number the machines from 0 to NNODES - 1"))
    if nodes > 1 and not address:
        problems.append(Problem("MASTER_ADDR", "", "is missing; name the machine with NODE_RANK=0, the same on all"))
    refuse_if_any(problems)
    return Place(nodes, rank, address, port, processes)


def count_processes(config: RunConfig, place: Place) -> int:
    """Ranks on this machine: what was asked for, else its GPUs, else the topology's ranks dealt out to CPUs.

    Raises `Refused` unless the machines together run the topology's ranks, and its nodes are the machines.
    """
    world, topology = config.topology.world_size, config.topology
    gpus = 0 if config.training.device == "cpu" else torch.cuda.device_count()
    processes = place.processes or gpus or max(1, world // place.nodes)
    problems = []
    if place.nodes * processes != world:
        total = f"NNODES x GPUS_PER_NODE = {place.nodes} x {processes} = {place.nodes * processes} processes"
        remedy = f"{total}, and the topology asks for {world}; {_how_to_fit(world, place, processes, gpus)}"
        problems.append(Problem("GPUS_PER_NODE", processes, remedy))
    if place.nodes > 1 and topology.gpus_per_node != processes:
        remedy = f"each machine runs {processes}; write topology.gpus_per_node={processes}"
        problems.append(Problem("topology.gpus_per_node", topology.gpus_per_node, remedy))
    refuse_if_any(problems)
    return processes


def _how_to_fit(world: int, place: Place, processes: int, gpus: int) -> str:
    ranks = place.nodes * processes
    topology = "topology=single" if ranks == 1 else f"a topology of {ranks} ranks (pp x edp x ep)"
    if world % place.nodes:
        return f"write {topology}"
    share = world // place.nodes
    cpu = " and training.device=cpu" if 0 < gpus < share else ""
    return f"write {topology}, or GPUS_PER_NODE={share}{cpu}"


def run_node(overrides: Sequence[str], config_dir: Path | None, *, fresh: bool) -> int:
    """Run this machine's ranks to the end; return the exit code.

    Machine 0 returns that of the run, as `shoestring train` does; the others return torchrun's own. Raises `Refused`
    before any process exists.
    """
    place = read_place(os.environ)
    config = compose_run(overrides, config_dir)
    processes = count_processes(config, place)
    preflight(config, processes, fresh=fresh, first_machine=place.rank == 0)
    arguments = [*overrides, *([] if config_dir is None else ["--config-dir", str(config_dir)])]
    local = LocalRanks(processes, tuple(place.torchrun(processes)))
    if place.rank == 0:
        return launch(config, local, arguments, fresh=fresh)
    if not fresh and is_finished(config):
        return 0
    if not fresh and spent_budget(config) is not None:
        return Halt.OVER_BUDGET
    try:
        return run_torchrun(config, local, arguments, uuid.uuid4().hex[:12])
    except Stopped as stop:
        return stop.exit_code


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of launch/torchrun.sh: the arguments are those of `shoestring train`."""
    options = parse(arguments)
    try:
        code = run_node(options.overrides, options.config_dir, fresh=options.fresh)
    except Refused as refused:
        print("launch/torchrun.sh: refused", file=sys.stderr)
        for problem in refused.problems:
            print(f"  {problem}", file=sys.stderr)
        code = _REFUSED
    sys.exit(code)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand before, between and behind options."""
    parser = argparse.ArgumentParser(prog="torchrun.sh", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="group=choice or key=value, as in Hydra")
    parser.add_argument("--config-dir", type=Path, help="a directory with configuration groups of your own")
    parser.add_argument("--fresh", action="store_true", help="empty training.run_dir first")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    main()
