"""N simulated nodes on one bridge, each with an uplink of a given rate, for tests and benchmarks.

    with SimulatedCluster(nodes=4, uplink="200mbit") as cluster:
        processes = [cluster.start_process(node, ["hostname"]) for node in range(cluster.nodes)]

The bridge is in separate namespaces too: nothing of a cluster is visible on the host, several clusters do not see each
other, and all use the same addresses. The host and its network cannot be reached. A cluster ends with its owner, also
if the owner is killed. The first process of a node is a `cat` whose input is a pipe from the owner. When the owner
closes the pipe, or dies for any reason, `cat` ends; the kernel then kills every other process of its process-id
namespace, and with the last one removes the network namespace, its interfaces and its mounts.

An uplink is shaped in both directions, like the port of a switch: with a token bucket where the node sends and one
where the bridge sends to the node, so that several nodes that send to one share its rate. Traffic between ranks of one
node is not shaped: it goes over lo, and does not count as uplink bytes.
"""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import IO, Self

from ...comm.errors import ConfigError, Problem, raise_if_any
from ..run.rank_environment import SAFE_PATH_ENVIRONMENT, build_rank_environment
from ..run.torchrun import TORCHRUN_COMMAND, wait_for_torchruns

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
_PROGRAMS = {
    "ip": "iproute2",
    "tc": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "mount": "mount",
    "tee": "coreutils",
}
"""Programs that are called, and the Debian package of each."""
_UNSHARE = ("unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--mount-proc")


def namespace_problems() -> Iterator[Problem]:
    """Yield a problem for each missing program or permission without which nodes cannot be simulated here."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    for program in missing:
        yield Problem(program, None, f"no such program on PATH; it comes with the package {_PROGRAMS[program]}")
    if os.geteuid() != 0:
        yield Problem("user", os.geteuid(), "must be root to create network namespaces and interfaces")
    elif "unshare" not in missing:
        probe = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True, check=False)
        if probe.returncode:
            hint = f"root cannot create namespaces here ({probe.stderr.strip()}); a container must be privileged"
            yield Problem("user", 0, hint)


class NamespaceProcess(subprocess.Popen[str]):
    """Process on a simulated node: a `Popen` of nsenter, whose exit code is that of the process.

    Signals go to the process itself, since nsenter would die of them and leave it running. It is in a separate session,
    so Ctrl-C in the terminal reaches only the owner, which decides how the nodes end.
    """

    def send_signal(self, sig: int) -> None:
        """Send `sig` to the process, if it has not ended."""
        child = _child(self)
        if child is not None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(child, sig)


@dataclass(frozen=True)
class NamespaceNode:
    """Running simulated node. It has only the interface lo, which is down."""

    unshare_process: subprocess.Popen[bytes]
    """`unshare`, which waits for `cat` and ends after every process of the node."""
    init_pid: int
    """Process id of `cat` in the owner's namespace, which identifies the node's namespaces."""

    @staticmethod
    def create(cleanup: ExitStack) -> "NamespaceNode":
        """Start a node, which ends with `cleanup`. Its working directory is the owner's."""
        pipe = subprocess.PIPE
        holder = subprocess.Popen([*_UNSHARE, "cat"], stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stderr is not None
        # An answer has gone through `cat`, so all namespaces exist.
        with suppress(BrokenPipeError):
            holder.stdin.write(b"on\n")
            holder.stdin.flush()
        first = _child(holder) if holder.stdout.readline() else None
        if first is None:
            with holder:
                raise subprocess.CalledProcessError(holder.wait(), _UNSHARE, stderr=holder.stderr.read().decode())
        node = NamespaceNode(holder, first)
        cleanup.callback(node.kill_all_processes)
        return node

    def run_setup_command(self, *command: str, stdin_text: str = "") -> None:
        """Run a program that configures the node, with `stdin_text` as its input, and wait for it.

        It does not enter the process-id namespace, so process ids are the owner's. Raises `CalledProcessError`.
        """
        enter = ["nsenter", f"--target={self.init_pid}", "--net", "--mount", "--uts", "--"]
        subprocess.run([*enter, *command], input=stdin_text, capture_output=True, text=True, check=True)

    def kill_all_processes(self) -> None:
        """Kill every process of the node and wait until the last has ended."""
        with self.unshare_process:  # closes the pipe, waits for unshare
            if self.unshare_process.poll() is None:
                os.kill(self.init_pid, signal.SIGKILL)  # a fork of the owner may hold the pipe open


def _child(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> int | None:
    """Return the process that nsenter or unshare forks, once it has; None if they have ended."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None:
        if found := children.read_text().split():
            return int(found[0])
        time.sleep(0.001)  # until it forks
    return None


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

    def __exit__(self, *error: object) -> None:
        self._cleanup.close()

    def _build(self, cleanup: ExitStack) -> None:
        self._switch = NamespaceNode.create(cleanup)
        _ip(self._switch, "link add bridge0 type bridge", "link set bridge0 addrgenmode none up")
        names = "".join(f"{self.node_address(node)} node{node}\n" for node in range(self.nodes))
        with tempfile.NamedTemporaryFile("w") as hosts:
            hosts.write(f"127.0.0.1 localhost\n{names}")
            hosts.flush()
            for node in range(self.nodes):
                namespace_node = NamespaceNode.create(cleanup)
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
        target = f"--target={self._running_node(node).init_pid}"
        return NamespaceProcess(
            ["nsenter", target, "--net", "--pid", "--mount", "--uts", "--wd", "--", *command],
            env=os.environ | (environment or {}) | self.node_environment(node),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            errors="replace",
            start_new_session=True,
        )

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
        lines = Path(f"/proc/{self._nodes[node].init_pid}/net/dev").read_text().splitlines()
        counters = {name.strip(): counts.split() for name, _, counts in (line.partition(":") for line in lines)}
        return int(counters[_INTERFACE][8])  # the first eight columns count what was received

    def _running_node(self, node: int) -> NamespaceNode:
        if node in self._bytes_of_killed:
            raise ValueError(f"node {node} has been killed")
        return self._nodes[node]


def _ip(namespace_node: NamespaceNode, *commands: str) -> None:
    namespace_node.run_setup_command("ip", "-batch", "-", stdin_text="".join(f"{command}\n" for command in commands))


def _bits_per_second(text: str) -> int:
    """Parse a rate; return 0 for an invalid one."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", text)
    return round(float(found[1]) * _UNITS[found[2]]) if found else 0
