"""`shoestring train` on one node of several; launch/torchrun.sh starts it on each node."""

import argparse
import os
import signal
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from ...comm.bootstrap import read_whole_number
from ...comm.errors import ConfigError, Problem, raise_if_any
from ...comm.rank_consistency import Fingerprints
from ...trainer.config import RunConfig
from ...trainer.run.exit import HaltReason
from ..answers.options import add_override_arguments
from ..cli import EXIT_CONFIG_ERROR, EXIT_FAILURE, exit_code
from ..compose import compose_run_config, read_config
from ..console import INVALID_CONFIGURATION, open_standard_streams, print_config_error, print_to_stderr
from .fingerprint import data_digest, run_fingerprint
from .launcher import LocalRanks, StoppedBySignal, launch_run, raise_on_stop_signals, restart_exit_code, run_torchrun
from .preflight import budget_blocker, is_run_finished, run_preflight_checks
from .rendezvous import (
    RendezvousEndpoint,
    host_rendezvous,
    join_rendezvous,
    master_address_problems,
    report_config_error,
)
from .run_dir import CONFIG_FILE, read_run_status
from .signals import STOP_SIGNALS, raise_on_early_stop
from .torchrun import local_torchrun_arguments

_PORT = 29500
_SECONDS_FOR_STATUS = 10
_POLL_SECONDS = 0.5
_NO_INSTANT = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class NodeEnvironment(RendezvousEndpoint):
    """Position of this node in the launch, and the address at which the nodes connect."""

    gpus_per_node: int | None = None
    """Ranks on each node; None if GPUS_PER_NODE is not set."""

    def torchrun_arguments(self, processes: int) -> list[str]:
        """Return torchrun's arguments for `processes` ranks on this node."""
        if self.node_count == 1:
            return local_torchrun_arguments(processes)
        # A static rendezvous: c10d's would number the nodes by the order of their addresses, so that neighbors in the
        # topology would not be neighbors in the network, and rank 0 could be on any node.
        master = [f"--master-addr={self.address}", f"--master-port={self.port}"]
        place = [f"--nnodes={self.node_count}", f"--node-rank={self.node_rank}"]
        return [*place, *master, f"--nproc-per-node={processes}"]


def read_node_environment(environment: Mapping[str, str]) -> NodeEnvironment:
    """Read the variables of launch/torchrun.sh. Raises `ConfigError` with every problem."""
    problems: list[Problem] = []

    def whole(name: str, default: int, low: int, high: int) -> int:
        return read_whole_number(name, environment.get(name) or str(default), low, high, problems)

    nodes = whole("NNODES", 1, 1, 100_000)
    rank = whole("NODE_RANK", 0, 0, 100_000)
    port = whole("MASTER_PORT", _PORT, 1, 65535)
    processes = whole("GPUS_PER_NODE", 1, 1, 1024) if environment.get("GPUS_PER_NODE") else None
    address = environment.get("MASTER_ADDR", "")
    if not problems and rank >= nodes:
        problems.append(Problem("NODE_RANK", rank, f"must be less than NNODES = {nodes}: nodes count from 0"))
    if nodes > 1 and not environment.get("NODE_RANK"):
        problems.append(Problem("NODE_RANK", "", "is missing; number the nodes from 0 to NNODES - 1"))
    if nodes > 1 and not address:
        hint = "is missing; write the address of the node with NODE_RANK=0, the same on all nodes"
        problems.append(Problem("MASTER_ADDR", "", hint))
    raise_if_any(problems)
    return NodeEnvironment(address, port, nodes, rank, gpus_per_node=processes)


def count_local_ranks(config: RunConfig, place: NodeEnvironment) -> int:
    """Return the number of ranks on this node: GPUS_PER_NODE, else its GPUs, else an equal share of the topology.

    Raises `ConfigError` unless the nodes together run the topology's ranks, and `topology.gpus_per_node` matches.
    """
    world, topology = config.topology.world_size, config.topology
    gpus = 0 if config.training.device == "cpu" else torch.cuda.device_count()
    processes = place.gpus_per_node or gpus or max(1, world // place.node_count)
    problems = []
    if place.node_count * processes != world:
        total = f"NNODES x GPUS_PER_NODE = {place.node_count} x {processes} = {place.node_count * processes} processes"
        hint = f"{total}, and the topology needs {world}; {_how_to_fit(world, place, processes, gpus)}"
        problems.append(Problem("GPUS_PER_NODE", processes, hint))
    if place.node_count > 1 and topology.gpus_per_node != processes:
        hint = f"each node runs {processes} ranks; write topology.gpus_per_node={processes}"
        problems.append(Problem("topology.gpus_per_node", topology.gpus_per_node, hint))
    raise_if_any(problems)
    return processes


def _how_to_fit(world: int, place: NodeEnvironment, processes: int, gpus: int) -> str:
    ranks = place.node_count * processes
    topology = "topology=single" if ranks == 1 else f"a topology of {ranks} ranks (pp x edp x ep)"
    if world % place.node_count:
        return f"write {topology}"
    share = world // place.node_count
    cpu = " and training.device=cpu" if 0 < gpus < share else ""
    return f"write {topology}, or GPUS_PER_NODE={share}{cpu}"


def run_node(overrides: Sequence[str], config_dir: Path | None, *, fresh: bool) -> int:
    """Run this node's ranks to the end; return the exit code of the run, or 1 if only this node failed.

    Raises `ConfigError` before any process exists, and `RendezvousError`.
    """
    place = read_node_environment(os.environ)
    try:
        config = compose_run_config(overrides, config_dir)
        processes = count_local_ranks(config, place)
        if place.node_count > 1:
            raise_if_any(master_address_problems(place.address))
        run_preflight_checks(config, processes, fresh=fresh, is_first_node=place.node_rank == 0)
    except ConfigError as error:
        if place.node_rank == 0:
            raise
        print_config_error("launch/torchrun.sh", INVALID_CONFIGURATION, error)
        report_config_error(place, error)
        return EXIT_CONFIG_ERROR
    local = LocalRanks(processes, tuple(place.torchrun_arguments(processes)))
    if place.node_count == 1:
        return launch_run(config, local, fresh=fresh)
    # Each node would resolve `${now:...}` to another time: node 0's is used, and a constant is compared.
    fingerprints = run_fingerprint(compose_run_config(overrides, config_dir, _NO_INSTANT), data_digest(config))
    endpoint = replace(place, timeout_seconds=config.training.rendezvous_timeout_seconds)
    if place.node_rank == 0:
        rendezvous = partial(host_rendezvous, endpoint, fingerprints, Path(config.training.run_dir))
        return launch_run(config, local, fresh=fresh, rendezvous=rendezvous)
    if not fresh and is_run_finished(config):
        return 0
    if not fresh and budget_blocker(config) is not None:
        return HaltReason.OVER_BUDGET
    return _run_other_node(endpoint, fingerprints, local)


def _run_other_node(endpoint: RendezvousEndpoint, fingerprints: Fingerprints, local: LocalRanks) -> int:
    """Run the ranks of a node other than node 0; return the exit code of the run, or 1 if it is not known."""
    try:
        with raise_on_stop_signals(STOP_SIGNALS):
            run_dir = join_rendezvous(endpoint, fingerprints)
    except StoppedBySignal as stop:
        print_to_stderr(f"shoestring train: {stop} before all nodes had connected")
        return HaltReason.PREEMPTED
    config = read_config(run_dir / CONFIG_FILE)
    # Rank 0 records how the run ended; it decides the exit code also if a rank of this node failed while it stopped.
    seconds: float = _SECONDS_FOR_STATUS
    try:
        code = run_torchrun(config, local, run_dir, uuid.uuid4().hex[:12])
        reason = f"a rank died (torchrun exit code {code})" if code else "the ranks of this node have ended"
        seconds = 0 if code else seconds
    except StoppedBySignal as stop:
        code, reason = stop.exit_code, str(stop)
        seconds = 0 if code == 128 + signal.SIGINT else seconds
    status = _status(run_dir, seconds)
    if status is None:
        print_to_stderr(
            f"shoestring train: {reason}. Node 0 did not record how the run ended; see the output of node 0"
        )
        return max(code, EXIT_FAILURE)
    if status["exit_code"] and "SLURM_JOB_ID" not in os.environ:  # all nodes of a Slurm job write into one file
        print_to_stderr(f"shoestring train: {status['reason']}")
    return restart_exit_code(run_dir, int(str(status["exit_code"])))


def _status(run_dir: Path, seconds: float) -> Mapping[str, object] | None:
    """Read rank 0's status, and wait up to `seconds` for a network file system to show it on this node."""
    deadline = time.monotonic() + seconds
    while (status := read_run_status(run_dir)) is None and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return status


def main(arguments: Sequence[str] | None = None) -> None:
    """Run launch/torchrun.sh, with the arguments of `shoestring train`, and exit with its code."""
    open_standard_streams()
    options = parse_arguments(arguments)

    def run() -> int:
        with raise_on_early_stop():
            return run_node(options.overrides, options.config_dir, fresh=options.fresh)

    sys.exit(exit_code("launch/torchrun.sh", INVALID_CONFIGURATION, run))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; overrides may come before, between and after options."""
    parser = argparse.ArgumentParser(prog="torchrun.sh", description=__doc__)
    add_override_arguments(parser, with_fresh=True)
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    main()
