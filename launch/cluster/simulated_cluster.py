"""N simulated nodes on one bridge, each with an uplink of a given rate, for tests and benchmarks.

    with SimulatedCluster(nodes=4, uplink="200mbit") as cluster:
        processes = [cluster.start_process(node, ["hostname"]) for node in range(cluster.nodes)]

The bridge is in separate namespaces too: nothing of a cluster is visible on the host, several clusters do not see each
other, and all use the same addresses. The host and its network cannot be reached. A cluster ends with its owner, also
if the owner is killed (see `namespaces.py`).

An uplink is shaped in both directions, like the port of a switch: with a token bucket where the node sends and one
where the bridge sends to the node, so that several nodes that send to one share its rate. Traffic between ranks of one
node is not shaped: it goes over lo, and does not count as uplink bytes.
"""

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
from ..run.rank_environment import SAFE_PATH_ENVIRONMENT, build_rank_environment
from ..run.torchrun import TORCHRUN_COMMAND, wait_for_torchruns
from .namespaces import NamespaceNode, NamespaceProcess, namespace_problems

_INTERFACE = "eth0"
_MAX_NODES = 250
_NETWORK = IPv4Network("10.0.0.0/16")
_PORT = 29500
_UNITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}

# The kernel passes up to 64 KiB and headers in one piece; a smaller bucket splits it into packets of 1,500 bytes, whose
# headers add 5 % to the counted bytes.
_BUCKET_BYTES = 2**17
# Longer than TCP lets a few flows fill: dropped packets are sent again and counted twice.
_QUEUE_BYTES = 2**25


class SimulatedCluster:
    """Cluster of simulated nodes `node0`, `node1`, …, which exist inside the `with` block.

    Args:
        nodes: number of nodes.
        uplink: rate of each node's uplink, such as `200mbit`; None for no limit.

    Raises `ConfigError` if either is invalid, or if this user or machine cannot simulate nodes.
    """

    def __init__(self, nodes: int, uplink: str | None = None) -> None:
        self.nodes = nodes
        self.uplink = uplink
        self._rate = None if uplink is None else _bits_per_second(uplink)
        raise_if_any([*self._problems(), *namespace_problems()])
        self._cleanup = ExitStack()
        self._nodes: list[NamespaceNode] = []
        self._bytes_of_killed: dict[int, int] = {}

    def _problems(self) -> Iterator[Problem]:
        if not 1 <= self.nodes <= _MAX_NODES:
            yield Problem("nodes", self.nodes, f"must be from 1 to {_MAX_NODES}")
        if self._rate is not None and not 10**6 <= self._rate <= 10**12:
            hint = "must be from 1mbit to 1000gbit, a number with kbit, mbit or gbit; omit it for no limit"
            yield Problem("uplink", self.uplink, hint)

    def __enter__(self) -> Self:
        with ExitStack() as cleanup:
            try:
                self._build(cleanup)
            except subprocess.CalledProcessError as error:
                hint = f"failed ({error.stderr.strip()}); it needs veth, bridges and tbf, and permission to create them"
                raise ConfigError([Problem("simulated cluster", " ".join(error.cmd), hint)]) from error
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def _build(self, cleanup: ExitStack) -> None:
        self._switch = _create_node(cleanup)
        _ip(self._switch, "link add bridge0 type bridge", "link set bridge0 addrgenmode none up")
        names = "".join(f"{self.node_address(node)} node{node}\n" for node in range(self.nodes))
        with tempfile.NamedTemporaryFile("w") as hosts:
            hosts.write(f"127.0.0.1 localhost\n{names}")
            hosts.flush()
            for node in range(self.nodes):
                namespace_node = _create_node(cleanup)
                self._nodes.append(namespace_node)
                self._connect(node)
                namespace_node.run_setup_command("tee", "/proc/sys/kernel/hostname", stdin_text=f"node{node}")
                namespace_node.run_setup_command(
                    "mount", "--bind", hosts.name, "/etc/hosts"
                )  # outlives the file's name

    def _connect(self, node: int) -> None:
        namespace_node, port = self._nodes[node], f"node{node}"
        # addrgenmode none: otherwise IPv6 announcements add to the counted bytes.
        _ip(
            self._switch,
            f"link add {port} type veth peer name {_INTERFACE} netns {namespace_node.init_pid}",
            f"link set {port} addrgenmode none",
            f"link set {port} master bridge0 up",
        )
        _ip(
            namespace_node,
            "link set lo up",
            f"link set {_INTERFACE} addrgenmode none",
            f"address add {self.node_address(node)}/{_NETWORK.prefixlen} dev {_INTERFACE}",
            f"link set {_INTERFACE} up",
        )
        # reno is in every kernel. A host's bbr would probe for the rate, which is known here, by sending more.
        namespace_node.run_setup_command("tee", "/proc/sys/net/ipv4/tcp_congestion_control", stdin_text="reno")
        if self._rate is not None:
            bucket = ["tbf", "rate", f"{self._rate}bit", "burst", str(_BUCKET_BYTES), "limit", str(_QUEUE_BYTES)]
            namespace_node.run_setup_command("tc", "qdisc", "add", "dev", _INTERFACE, "root", *bucket)
            self._switch.run_setup_command("tc", "qdisc", "add", "dev", port, "root", *bucket)

    def node_address(self, node: int) -> str:
        """Return the address of the node's uplink, which all nodes can also name `node0`, `node1`, …."""
        return str(_NETWORK[node + 1])

    def node_environment(self, node: int) -> dict[str, str]:
        """Return the variables of a node's processes: those of launch/torchrun.sh, and gloo's interface."""
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
        """Start a process on a node, with the owner's variables, `environment`, and the node's variables.

        It and its children end with the cluster at the latest. File systems are the host's.
        """
        variables = os.environ | (environment or {}) | self.node_environment(node)
        return self._running_node(node).start_process(command, variables, stdout, stderr)

    def run_ranks(self, arguments: Sequence[str], ranks: int, seconds: float) -> None:
        """Run `python <arguments>` as `ranks` ranks, an equal part of them on each node. Raises `RanksFailed`."""
        processes = []
        for node in range(self.nodes):
            variables = self.node_environment(node)
            master = [f"--master-addr={variables['MASTER_ADDR']}", f"--master-port={variables['MASTER_PORT']}"]
            place = [f"--nnodes={self.nodes}", f"--node-rank={node}", f"--nproc-per-node={ranks // self.nodes}"]
            command = [*TORCHRUN_COMMAND, *place, *master, *arguments]
            processes.append(self.start_process(node, command, build_rank_environment(SAFE_PATH_ENVIRONMENT)))
        wait_for_torchruns(processes, seconds)

    def cut_link(self, node: int) -> None:
        """Disconnect the node: packets from and to it are dropped without an error."""
        self._running_node(node)
        _ip(self._switch, f"link set node{node} down")

    def restore_link(self, node: int) -> None:
        """Reconnect the node."""
        self._running_node(node)
        _ip(self._switch, f"link set node{node} up")

    def kill_node(self, node: int) -> None:
        """Kill every process of the node, permanently; its count of sent bytes is kept."""
        self._bytes_of_killed[node] = self.uplink_bytes_sent(node)
        self._nodes[node].kill_all_processes()

    def uplink_bytes_sent(self, node: int) -> int:
        """Return the bytes that the node has sent through its uplink, headers included."""
        if node in self._bytes_of_killed:
            return self._bytes_of_killed[node]
        return self._nodes[node].interface_bytes_sent(_INTERFACE)

    def total_bytes_sent(self) -> int:
        """Return the bytes that all nodes have sent through their uplinks, headers included."""
        return sum(self.uplink_bytes_sent(node) for node in range(self.nodes))

    def _running_node(self, node: int) -> NamespaceNode:
        if node in self._bytes_of_killed:
            raise ValueError(f"node {node} has been killed")
        return self._nodes[node]


def _create_node(cleanup: ExitStack) -> NamespaceNode:
    namespace_node = NamespaceNode.create()
    cleanup.callback(namespace_node.kill_all_processes)
    return namespace_node


def _ip(namespace_node: NamespaceNode, *commands: str) -> None:
    namespace_node.run_setup_command("ip", "-batch", "-", stdin_text="".join(f"{command}\n" for command in commands))


def _bits_per_second(text: str) -> int:
    """Parse a rate; return 0 for an invalid one."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", text)
    return round(float(found[1]) * _UNITS[found[2]]) if found else 0
