"""One machine's share of `shoestring train` over several machines: launch/torchrun.sh starts it on each of them."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from ...comm.agreement import Facts
from ...comm.errors import ConfigError, Problem, refuse_if_any
from ...trainer.config import RunConfig
from ...trainer.run.exit import Halt
from ..compose import compose_run, read_config
from ..say import open_standard_streams, say
from .identity import data_digest, identity
from .launcher import LocalRanks, Stopped, asked_to_stop, launch, run_torchrun, stop_signals_raise
from .preflight import is_finished, preflight, spent_budget
from .rendezvous import MachinesMissing, MeetingPoint, address_problems, attend_meeting, host_meeting, report_refusal
from .run_dir import CONFIG_FILE, read_status
from .signals import ASKING_SIGNALS, StoppedEarly, stops_before_it_began
from .torchrun import local_torchrun

_PORT = 29500
_FAULT, _REFUSED = 1, 2
_NO_WAIT = 0.0
_SECONDS_FOR_STATUS = 10
_SECONDS_BETWEEN_LOOKS = 0.5
_NO_INSTANT = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class MachinePlace:
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

    def venue(self, seconds: float) -> MeetingPoint:
        """Where the machines meet, who wait for each other so long."""
        return MeetingPoint(self.address, self.port, self.nodes, self.rank, seconds)

    def torchrun(self, processes: int) -> list[str]:
        """Arguments of torchrun for `processes` ranks on this machine.

        The rendezvous is static: c10d numbers the machines by the order of their addresses, so that neighbors in the
        topology would not be neighbors in the network, and rank 0 could be anywhere.
        """
        if self.nodes == 1:
            return local_torchrun(processes)
        meeting = [f"--master-addr={self.address}", f"--master-port={self.port}"]
        return [f"--nnodes={self.nodes}", f"--node-rank={self.rank}", *meeting, f"--nproc-per-node={processes}"]


def read_place(environment: Mapping[str, str]) -> MachinePlace:
    """The machine that the variables of launch/torchrun.sh describe. Raises `ConfigError` with all that is wrong."""
    problems: list[Problem] = []

    def whole(name: str, default: int, low: int, high: int) -> int:
        text = environment.get(name) or str(default)
        if text.isascii() and text.isdecimal() and len(text) <= len(str(high)) and low <= int(text) <= high:
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
    return MachinePlace(nodes, rank, address, port, processes)


def count_processes(config: RunConfig, place: MachinePlace) -> int:
    """Ranks on this machine: what was asked for, else its GPUs, else the topology's ranks dealt out to CPUs.

    Raises `ConfigError` unless the machines together run the topology's ranks, and its nodes are the machines.
    """
    world, topology = config.topology.world_size, config.topology
    gpus = 0 if config.training.device == "cpu" else torch.cuda.device_count()
    processes = place.processes or gpus or max(1, world // place.nodes)
    problems = []
    if place.nodes * processes != world:
        total = f"NNODES x GPUS_PER_NODE = {place.nodes} x {processes} = {place.nodes * processes} processes"
        hint = f"{total}, and the topology asks for {world}; {_how_to_fit(world, place, processes, gpus)}"
        problems.append(Problem("GPUS_PER_NODE", processes, hint))
    if place.nodes > 1 and topology.gpus_per_node != processes:
        hint = f"each machine runs {processes}; write topology.gpus_per_node={processes}"
        problems.append(Problem("topology.gpus_per_node", topology.gpus_per_node, hint))
    refuse_if_any(problems)
    return processes


def _how_to_fit(world: int, place: MachinePlace, processes: int, gpus: int) -> str:
    ranks = place.nodes * processes
    topology = "topology=single" if ranks == 1 else f"a topology of {ranks} ranks (pp x edp x ep)"
    if world % place.nodes:
        return f"write {topology}"
    share = world // place.nodes
    cpu = " and training.device=cpu" if 0 < gpus < share else ""
    return f"write {topology}, or GPUS_PER_NODE={share}{cpu}"


def run_node(overrides: Sequence[str], config_dir: Path | None, *, fresh: bool) -> int:
    """Run this machine's ranks to the end; return the exit code.

    Every machine returns that of the run, as `shoestring train` does, or 1 for its own fault. Raises `ConfigError`
    before any process exists, and `MachinesMissing`.
    """
    place = read_place(os.environ)
    try:
        config = compose_run(overrides, config_dir)
        processes = count_processes(config, place)
        if place.nodes > 1:
            refuse_if_any(address_problems(place.address))
        preflight(config, processes, fresh=fresh, first_machine=place.rank == 0)
    except ConfigError as refused:
        if place.rank == 0:
            raise
        _say_refused(refused)
        report_refusal(place.venue(_NO_WAIT), refused)
        return _REFUSED
    local = LocalRanks(processes, tuple(place.torchrun(processes)))
    if place.nodes == 1:
        return launch(config, local, fresh=fresh)
    # Each machine would put another instant in the place of `${now:...}`: machine 0's holds, and is not compared.
    facts = identity(compose_run(overrides, config_dir, _NO_INSTANT), data_digest(config))
    venue = place.venue(config.training.meeting_timeout_seconds)
    if place.rank == 0:
        run_dir = Path(config.training.run_dir)
        return launch(config, local, fresh=fresh, meet=lambda attempt: host_meeting(venue, facts, run_dir, attempt))
    if not fresh and is_finished(config):
        return 0
    if not fresh and spent_budget(config) is not None:
        return Halt.OVER_BUDGET
    return _share(venue, facts, local)


def _share(venue: MeetingPoint, facts: Facts, local: LocalRanks) -> int:
    """Run the ranks of a machine that is not machine 0; return the exit code of the run, or 1 for a fault."""
    try:
        with stop_signals_raise(ASKING_SIGNALS):
            run_dir = attend_meeting(venue, facts)
    except Stopped as stop:
        say(f"shoestring train: {stop} before the machines had met")
        return Halt.PREEMPTED
    config = read_config(run_dir / CONFIG_FILE)
    # Rank 0 says how the run ended, also where a rank of this machine that was asked to stop did not end well.
    seconds: float = _SECONDS_FOR_STATUS
    try:
        code = run_torchrun(config, local, run_dir, uuid.uuid4().hex[:12])
        reason = f"a rank died, torchrun exited with {code}" if code else "the ranks of this machine have ended"
        seconds = 0 if code else seconds
    except Stopped as stop:
        code, reason = stop.exit_code, str(stop)
        seconds = 0 if code == 128 + signal.SIGINT else seconds
    status = _status(run_dir, seconds)
    if status is None:
        say(f"shoestring train: {reason}, and machine 0 has not said how the run ended; look what it says")
        return code if code > _FAULT else _FAULT
    found = int(str(status["exit_code"]))
    if found and "SLURM_JOB_ID" not in os.environ:  # all machines of a job write into one file
        say(f"shoestring train: {status['reason']}")
    return asked_to_stop(run_dir) if found == Halt.PREEMPTED else found


def _status(run_dir: Path, seconds: float) -> Mapping[str, object] | None:
    """What rank 0 has left, which may show a moment later on this machine."""
    deadline = time.monotonic() + seconds
    while (status := read_status(run_dir)) is None and time.monotonic() < deadline:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return status


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of launch/torchrun.sh: the arguments are those of `shoestring train`."""
    open_standard_streams()
    options = parse(arguments)
    try:
        with stops_before_it_began():
            code = run_node(options.overrides, options.config_dir, fresh=options.fresh)
    except StoppedEarly as stopped:
        say(f"launch/torchrun.sh: stopped by {stopped}")
        code = int(Halt.PREEMPTED)
    except ConfigError as refused:
        _say_refused(refused)
        code = _REFUSED
    except MachinesMissing as error:
        say(f"launch/torchrun.sh: {error}")
        code = _FAULT
    sys.exit(code)


def _say_refused(refused: ConfigError) -> None:
    say("launch/torchrun.sh: refused")
    for problem in refused.problems:
        say(f"  {problem}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand before, between and behind options."""
    parser = argparse.ArgumentParser(prog="torchrun.sh", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="group=choice or key=value, as in Hydra")
    parser.add_argument("--config-dir", type=Path, help="a directory with configuration groups of your own")
    parser.add_argument("--fresh", action="store_true", help="empty training.run_dir first")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    main()
