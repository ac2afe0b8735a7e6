"""`shoestring cluster`: a training run over several nodes simulated on this machine, with injected faults.

Every node runs launch/run/node.py, as launch/torchrun.sh does on a real node. Node 0 prints to the terminal; the output
of the other nodes is printed if the run fails.
"""

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

from ...comm.errors import ConfigError, Problem, collect_problems, raise_if_any
from ...trainer.config import RunConfig
from ...trainer.telemetry.events import METRICS_FILE, StepLogged
from ...trainer.telemetry.history import read_all_metrics
from ..compose import compose_run_config
from ..console import print_to_stderr, print_to_stdout
from ..run.launcher import StoppedBySignal, raise_on_stop_signals
from ..run.preflight import run_preflight_checks
from .simulated_cluster import NamespaceProcess, SimulatedCluster

# Time for the other nodes to end after one has failed: a disconnected node does not learn of it, and would wait.
_SECONDS_FOR_OTHERS = 15
# Time after a fault, added to the timeout of one collective.
_SECONDS_AFTER_FAULT = 30
# Time for node 0 to end its ranks and close the ledger; its launcher gives torchrun 30 s of it.
_SECONDS_TO_END = 40
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class InjectedFault:
    """Fault of a node, injected once the run has logged a step."""

    option: str
    """`--cut-link` or `--kill-node`."""
    node: int
    step: int

    @staticmethod
    def parse(option: str, text: str, nodes: int) -> "InjectedFault":
        """Parse `NODE@STEP`. Raises `ConfigError`."""
        node, _, step = text.partition("@")
        if not (node.isdecimal() and step.isdecimal() and int(node) < nodes and int(step) > 0):
            hint = f"must be NODE@STEP, such as 0@20, with a node from 0 to {nodes - 1} and a step from 1"
            raise ConfigError([Problem(option, text, hint)])
        return InjectedFault(option, int(node), int(step))

    def inject(self, cluster: SimulatedCluster) -> str:
        """Inject the fault; return a text for the summary."""
        if self.option == "--cut-link":
            cluster.cut_link(self.node)
            return f"link cut at step {self.step}"
        cluster.kill_node(self.node)
        return f"killed at step {self.step}"


@dataclass(frozen=True)
class SimulatedClusterRun:
    """Run on a simulated cluster: its configuration, its nodes and its faults."""

    overrides: Sequence[str]
    config_dir: Path | None
    fresh: bool
    nodes: int
    gpus_per_node: int
    uplink_rate: str | None
    faults: Sequence[tuple[str, str]] = ()
    """Option and `NODE@STEP`."""

    def all_overrides(self) -> list[str]:
        """Return the overrides, with those that the cluster implies added unless they are given."""
        implied = {"topology.gpus_per_node": str(self.gpus_per_node), "training.device": "cpu"}
        if self.faults:
            implied["telemetry.log_every"] = "1"  # faults wait for the log line of their step
        given = {text.lstrip("+").partition("=")[0] for text in self.overrides}
        return [*self.overrides, *(f"{key}={value}" for key, value in implied.items() if key not in given)]

    def node_command(self) -> list[str]:
        """Return the command of every node, which reads its number from its environment."""
        command = [sys.executable, "-m", "shoestring.launch.run.node", *self.all_overrides()]
        command += [] if self.config_dir is None else ["--config-dir", str(self.config_dir)]
        return command + (["--fresh"] if self.fresh else [])

    def compose_config(self) -> RunConfig:
        """Compose and check the configuration. Raises `ConfigError` for one that these nodes cannot run."""
        config = compose_run_config(self.all_overrides(), self.config_dir)
        raise_if_any(self._problems(config))
        run_preflight_checks(config, self.gpus_per_node, fresh=self.fresh)
        return config

    def _problems(self, config: RunConfig) -> Iterator[Problem]:
        ranks, topology = self.nodes * self.gpus_per_node, config.topology
        if ranks != topology.world_size:
            total = f"--nodes x --gpus-per-node = {self.nodes} x {self.gpus_per_node} = {ranks} ranks"
            hint = f"{total}, and the topology needs {topology.world_size}"
            yield Problem("--gpus-per-node", self.gpus_per_node, hint)
        if topology.gpus_per_node != self.gpus_per_node:
            hint = f"--gpus-per-node is {self.gpus_per_node}; write the same value, or remove this override"
            yield Problem("topology.gpus_per_node", topology.gpus_per_node, hint)
        if config.training.device != "cpu":
            hint = "the simulated nodes would share the GPUs of this machine; write cpu, or remove this override"
            yield Problem("training.device", config.training.device, hint)
        if config.telemetry.wandb.mode == "online":
            hint = "a simulated cluster has no network access; write offline"
            yield Problem("telemetry.wandb.mode", "online", hint)


def run_on_simulated_cluster(run: SimulatedClusterRun) -> int:
    """Run it; return the exit code of node 0, or if that is 0 the first non-zero code of another node.

    Raises `ConfigError` before any process of the run exists.
    """
    problems: list[Problem] = []
    faults: list[InjectedFault] = []
    for option, text in run.faults:
        with collect_problems(problems):
            faults.append(InjectedFault.parse(option, text, run.nodes))
    if len({fault.node for fault in faults}) < len(faults):
        broken = ", ".join(text for _, text in run.faults)
        problems.append(Problem("--cut-link, --kill-node", broken, "a node can have one fault"))
    with collect_problems(problems):
        cluster = SimulatedCluster(run.nodes, run.uplink_rate)
    with collect_problems(problems):
        config = run.compose_config()
        hint = f"would never happen: the run has {config.total_steps} steps; use an earlier step"
        late = (fault for fault in faults if fault.step >= config.total_steps)
        problems += (Problem(fault.option, f"{fault.node}@{fault.step}", hint) for fault in late)
    raise_if_any(problems)
    try:
        with raise_on_stop_signals(), cluster, ExitStack() as cleanup:
            logs = [cleanup.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in range(1, run.nodes)]
            return _run(run, config, cluster, faults, logs)
    except StoppedBySignal as stop:  # before the nodes had started, or a second signal
        return stop.exit_code


def _run(
    run: SimulatedClusterRun,
    config: RunConfig,
    cluster: SimulatedCluster,
    faults: Sequence[InjectedFault],
    logs: Sequence[IO[str]],
) -> int:
    """Start the nodes, wait for them, and print the result. `logs` are of all nodes but 0, which uses the terminal."""
    last_step = partial(_last_step, Path(config.training.run_dir) / METRICS_FILE, time.time())
    outputs: list[IO[str] | None] = [None, *logs]
    variables = {"GPUS_PER_NODE": str(run.gpus_per_node)}
    processes = [
        cluster.start_process(node, run.node_command(), variables, stdout=output, stderr=output)
        for node, output in enumerate(outputs)
    ]
    nodes, code = _RunningNodes(cluster, processes), None
    try:
        nodes.wait(faults, last_step, config.training.collective_timeout_seconds + _SECONDS_AFTER_FAULT)
    except StoppedBySignal as stop:
        code = stop.exit_code
    nodes.end()
    if code is None:
        # As a shell does: 128 + n for signal n.
        codes = (process.returncode if process.returncode >= 0 else 128 - process.returncode for process in processes)
        code = next(filter(None, codes), 0)
    if code:
        _show_logs(logs)
    nodes.show_traffic()
    return code


def _last_step(metrics: Path, began: float) -> int:
    """Return the last step that the run has logged since `began`, 0 before the first."""
    try:
        events = read_all_metrics(metrics)
    except ConfigError:  # no file yet, or --fresh has just removed it
        return 0
    return max((event.step for event in events if isinstance(event, StepLogged) and event.time >= began), default=0)


@dataclass(frozen=True)
class _RunningNodes:
    """Processes of all nodes, and what has happened to each node."""

    cluster: SimulatedCluster
    processes: Sequence[NamespaceProcess]
    outcomes: dict[int, str] = field(default_factory=dict)

    def wait(self, faults: Sequence[InjectedFault], last_step: Callable[[], int], seconds_after_fault: float) -> None:
        """Inject the faults, and wait until all nodes have ended or their time is over.

        The time is `seconds_after_fault` after a fault, and less once a node has failed.
        """
        deadline, pending = math.inf, list(faults)
        while any(process.poll() is None for process in self.processes) and time.monotonic() < deadline:
            last = last_step() if pending else 0
            for fault in [fault for fault in pending if fault.step <= last]:
                pending.remove(fault)
                self.outcomes[fault.node] = fault.inject(self.cluster)
                deadline = min(deadline, time.monotonic() + seconds_after_fault)
            if self.processes[0].poll() is not None or any(process.poll() for process in self.processes):
                deadline = min(deadline, time.monotonic() + _SECONDS_FOR_OTHERS)
            time.sleep(_POLL_SECONDS)

    def end(self) -> None:
        """Request a stop of the remaining nodes, wait for node 0, which writes the ledger, and kill the others."""
        left = {node: process for node, process in enumerate(self.processes) if process.poll() is None}
        for process in left.values():
            process.terminate()
        if 0 in left:
            with suppress(subprocess.TimeoutExpired):
                left[0].wait(_SECONDS_TO_END)
        for node, process in left.items():
            if process.poll() is None:
                self.cluster.kill_node(node)
                self.outcomes.setdefault(node, "killed at the end")
                process.wait()

    def show_traffic(self) -> None:
        print_to_stdout(f"bytes sent over the uplink of each node ({self.cluster.uplink or 'no limit'}):")
        for node in range(self.cluster.nodes):
            sent, outcome = self.cluster.uplink_bytes_sent(node), self.outcomes.get(node, "")
            print_to_stdout(f"  node {node}  {sent:>15,}  {outcome}".rstrip())


def _show_logs(logs: Sequence[IO[str]]) -> None:
    for node, log in enumerate(logs, start=1):
        log.seek(0)
        for line in log:
            print_to_stderr(f"node {node} | {line.rstrip()}")
