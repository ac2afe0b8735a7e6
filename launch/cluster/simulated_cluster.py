"""N pretended machines on one bridge, each with an uplink of a given rate: a cluster for rehearsals, tests, benchmarks.

    with SimulatedCluster(nodes=4, uplink="200mbit") as cluster:
        processes = [cluster.start(node, ["hostname"]) for node in range(cluster.nodes)]

The bridge is in namespaces of its own too: nothing of a cluster is visible on the host, several clusters do not see
each other, and all use the same addresses. There is no way out to the host or to its network. A cluster ends with its
owner, also when that is killed (see `namespaces.py`).

An uplink is shaped in both directions, as a port of a switch is: with a token bucket where the node sends and one where
the bridge sends to the node, so that several nodes that send to one share its rate. Between ranks of one node nothing
is shaped: the kernel takes that way over lo, and it counts as no byte of the uplink.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from ipaddress import IPv4Network
from types import TracebackType
from typing import IO, Self

from ...comm.errors import ConfigError, Problem, raise_if_any
from .namespaces import NamespaceNode, NamespaceProcess, namespace_problems

_INTERFACE = "eth0"
_MOST_NODES = 250
_NETWORK = IPv4Network("10.0.0.0/16")
_PORT = 29500
_UNITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}

# The kernel hands over up to 64 KiB and headers at a time, and a bucket that holds less cuts that into packets of 1,500
# bytes, whose headers are then counted: 5 % more.
_BUCKET_BYTES = 2**17
# Longer than TCP lets a few flows fill: what overflows is sent again and counted twice.
_QUEUE_BYTES = 2**25


class SimulatedCluster:
    """Machines `node0`, `node1`, … , which exist inside the `with` block.

    Args:
        nodes: how many.
        uplink: rate of each, such as `200mbit`; None for as fast as the kernel goes.

    Raises `ConfigError` where either is impossible, and where this user or machine cannot pretend machines.
    """

    def __init__(self, nodes: int, uplink: str | None = None) -> None:
        self.nodes = nodes
        self.uplink = uplink
        self._rate = None if uplink is None else _bits_per_second(uplink)
        raise_if_any([*self._problems(), *namespace_problems()])
        self._cleanup = ExitStack()
        self._machines: list[NamespaceNode] = []
        self._sent_by_dead: dict[int, int] = {}

    def _problems(self) -> Iterator[Problem]:
        if not 1 <= self.nodes <= _MOST_NODES:
            yield Problem("nodes", self.nodes, f"must be from 1 to {_MOST_NODES}")
        if self._rate is not None and not 10**6 <= self._rate <= 10**12:
            hint = "must be from 1mbit to 1000gbit, a number with kbit, mbit or gbit; or leave it out for no limit"
            yield Problem("uplink", self.uplink, hint)

    def __enter__(self) -> Self:
        with ExitStack() as cleanup:
            try:
                self._build(cleanup)
            except subprocess.CalledProcessError as error:
                hint = f"failed ({error.stderr.strip()}); needs veth, bridges and tbf, and the right to make them"
                raise ConfigError([Problem("simulated cluster", " ".join(error.cmd), hint)]) from error
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def _build(self, cleanup: ExitStack) -> None:
        self._switch = _machine(cleanup)
        _ip(self._switch, "link add bridge0 type bridge", "link set bridge0 addrgenmode none up")
        names = "".join(f"{self.node_address(node)} node{node}\n" for node in range(self.nodes))
        with tempfile.NamedTemporaryFile("w") as hosts:
            hosts.write(f"127.0.0.1 localhost\n{names}")
            hosts.flush()
            for node in range(self.nodes):
                machine = _machine(cleanup)
                self._machines.append(machine)
                self._connect(node)
                machine.run_setup_command("tee", "/proc/sys/kernel/hostname", stdin_text=f"node{node}")
                machine.run_setup_command("mount", "--bind", hosts.name, "/etc/hosts")  # outlives the file's name

    def _connect(self, node: int) -> None:
        machine, port = self._machines[node], f"node{node}"
        # addrgenmode none: IPv6 would announce itself, in bytes that are counted.
        _ip(
            self._switch,
            f"link add {port} type veth peer name {_INTERFACE} netns {machine.init_pid}",
            f"link set {port} addrgenmode none",
            f"link set {port} master bridge0 up",
        )
        _ip(
            machine,
            "link set lo up",
            f"link set {_INTERFACE} addrgenmode none",
            f"address add {self.node_address(node)}/{_NETWORK.prefixlen} dev {_INTERFACE}",
            f"link set {_INTERFACE} up",
        )
        # In every kernel. A host's bbr would look for a rate that is known here, by sending more.
        machine.run_setup_command("tee", "/proc/sys/net/ipv4/tcp_congestion_control", stdin_text="reno")
        if self._rate is not None:
            bucket = ["tbf", "rate", f"{self._rate}bit", "burst", str(_BUCKET_BYTES), "limit", str(_QUEUE_BYTES)]
            machine.run_setup_command("tc", "qdisc", "add", "dev", _INTERFACE, "root", *bucket)
            self._switch.run_setup_command("tc", "qdisc", "add", "dev", port, "root", *bucket)

    def node_address(self, node: int) -> str:
        """Of the node's uplink. On every node, `node0`, `node1`, … are names for them."""
        return str(_NETWORK[node + 1])

    def node_environment(self, node: int) -> dict[str, str]:
        """The variables that processes of a node find set: those of launch/torchrun.sh, and gloo's interface."""
        return {
            "NNODES": str(self.nodes),
            "NODE_RANK": str(node),
            "MASTER_ADDR": self.node_address(0),
            "MASTER_PORT": str(_PORT),
            "GLOO_SOCKET_IFNAME": _INTERFACE,
        }

    def start_process(
        self,
        node: int,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        stdout: int | IO[str] | None = None,
        stderr: int | IO[str] | None = None,
    ) -> NamespaceProcess:
        """Start a process on a node, with the owner's variables, `environment`, and the cluster's own.

        It ends with the cluster at the latest, and so does what it starts. File systems are the host's.
        """
        variables = os.environ | (environment or {}) | self.node_environment(node)
        return self._alive(node).start_process(command, variables, stdout, stderr)

    def cut_link(self, node: int) -> None:
        """Unplug the node: what it sends or is sent disappears, and nobody is told."""
        self._alive(node)
        _ip(self._switch, f"link set node{node} down")

    def restore_link(self, node: int) -> None:
        """Plug the node in again."""
        self._alive(node)
        _ip(self._switch, f"link set node{node} up")

    def kill_node(self, node: int) -> None:
        """Kill every process of the node. It stays off; what it has sent is still known."""
        self._sent_by_dead[node] = self.uplink_bytes_sent(node)
        self._machines[node].kill_all_processes()

    def uplink_bytes_sent(self, node: int) -> int:
        """What has left through the node's uplink, headers included, since it exists."""
        if node in self._sent_by_dead:
            return self._sent_by_dead[node]
        return self._machines[node].interface_bytes_sent(_INTERFACE)

    def _alive(self, node: int) -> NamespaceNode:
        if node in self._sent_by_dead:
            raise ValueError(f"node {node} has been killed")
        return self._machines[node]


def _machine(cleanup: ExitStack) -> NamespaceNode:
    machine = NamespaceNode.create()
    cleanup.callback(machine.kill_all_processes)
    return machine


def _ip(machine: NamespaceNode, *commands: str) -> None:
    machine.run_setup_command("ip", "-batch", "-", stdin_text="".join(f"{command}\n" for command in commands))


def _bits_per_second(text: str) -> int:
    """0 for what is no rate."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", text)
    return round(float(found[1]) * _UNITS[found[2]]) if found else 0
