"""Simulated machines: they reach each other at the configured rate, break on request, and leave nothing behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoestring.launch.cluster.simulated_cluster import NamespaceProcess, SimulatedCluster
from shoestring.tests.launch.machines import alive, descendants, needs_machines, wait_until
from shoestring.tests.launch.refusals import refused

PAYLOAD, RATE = 1_000_000, 16_000_000  # bytes, bits/s: half a second of one uplink
BUCKET = 2**17  # burst size of an uplink
SECONDS = 60
# Listen, say so, read from N peers, and print the seconds from the first connection to the last byte.
SINK = """
import selectors, socket, sys, time
server = socket.create_server(("", 7000))
print("listening", flush=True)
peers, began = selectors.DefaultSelector(), None
for _ in range(int(sys.argv[1])):
    peer = server.accept()[0]
    began = began or time.monotonic()
    peers.register(peer, selectors.EVENT_READ)
while peers.get_map():
    for key, _ in peers.select():
        if not key.fileobj.recv(1 << 16):
            peers.unregister(key.fileobj)
print(time.monotonic() - began)
"""
SOURCE = """
import socket, sys
with socket.create_connection((sys.argv[1], 7000), timeout=60) as peer:
    peer.sendall(bytes(int(sys.argv[2])))
"""
# A child in another session, which only SIGKILL ends.
STUBBORN = """
import os, signal
if os.fork() == 0:
    os.setsid()
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
print("here", flush=True)
signal.pause()
"""


def python(cluster: SimulatedCluster, node: int, source: str, *arguments: object) -> NamespaceProcess:
    command = [sys.executable, "-I", "-S", "-c", source, *map(str, arguments)]
    return cluster.start_process(node, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def line(process: NamespaceProcess) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def said(process: NamespaceProcess) -> str:
    """Wait until the process ends without error; return its output."""
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    return out.strip()


def transfer(cluster: SimulatedCluster, sources: list[int], target: int) -> float:
    """Send PAYLOAD from each source at the same time; return the seconds that the target measured."""
    sink = python(cluster, target, SINK, len(sources))
    assert line(sink) == "listening"
    senders = [python(cluster, source, SOURCE, f"node{target}", PAYLOAD) for source in sources]
    for sender in senders:
        said(sender)
    return float(said(sink))


@pytest.fixture
def pair() -> Iterator[SimulatedCluster]:
    with SimulatedCluster(nodes=2) as cluster:
        yield cluster


@needs_machines
def test_a_node_is_a_separate_machine(pair: SimulatedCluster, tmp_path: Path) -> None:
    where = (
        "import os, socket; print(os.getcwd(), socket.gethostname(), socket.gethostbyname('node0'), os.getpid() < 99)"
    )
    assert said(python(pair, 1, where)) == f"{Path.cwd()} node1 {pair.node_address(0)} True"
    names = ("NNODES", "NODE_RANK", "MASTER_ADDR", "GLOO_SOCKET_IFNAME", "OWN")
    command = [sys.executable, "-I", "-S", "-c", f"import os; print(*(os.environ[name] for name in {names}))"]
    process = pair.start_process(1, command, {"OWN": "x", "NODE_RANK": "7"}, stdout=subprocess.PIPE)
    assert said(process) == f"2 1 {pair.node_address(0)} eth0 x"
    interfaces = "import socket; print(sorted(name for _, name in socket.if_nameindex()))"
    assert said(python(pair, 0, interfaces)) == "['eth0', 'lo']"
    assert not {"bridge0", "node0", "node1"} & {path.name for path in Path("/sys/class/net").iterdir()}


@needs_machines
def test_an_uplink_has_its_rate_in_both_directions_and_counts_its_bytes() -> None:
    with SimulatedCluster(nodes=3, uplink=f"{RATE / 1e6:g}mbit") as cluster:
        assert [cluster.uplink_bytes_sent(node) for node in range(3)] == [0, 0, 0]
        assert transfer(cluster, [0], 1) > 0.9 * 8 * (PAYLOAD - BUCKET) / RATE
        assert PAYLOAD < cluster.uplink_bytes_sent(0) < 1.1 * PAYLOAD
        assert cluster.uplink_bytes_sent(1) < 0.1 * PAYLOAD
        assert transfer(cluster, [0, 1], 2) > 0.9 * 8 * (2 * PAYLOAD - 2 * BUCKET) / RATE
        before = cluster.uplink_bytes_sent(2)
        transfer(cluster, [2], 2)
        assert cluster.uplink_bytes_sent(2) == before  # traffic inside a node does not cross the uplink


@needs_machines
def test_a_cut_link_swallows_everything_until_it_is_restored(pair: SimulatedCluster) -> None:
    sink = python(pair, 1, SINK, 1)
    assert line(sink) == "listening"
    pair.cut_link(1)
    attempt = SOURCE.replace("timeout=60", "timeout=0.5")
    _, error = python(pair, 0, attempt, "node1", 1).communicate(timeout=SECONDS)
    assert "TimeoutError: timed out" in error
    pair.restore_link(1)
    said(python(pair, 0, SOURCE, "node1", 1))
    said(sink)


@needs_machines
def test_a_killed_node_has_no_process_left_and_stays_off(pair: SimulatedCluster) -> None:
    stubborn, other = python(pair, 1, STUBBORN), python(pair, 0, STUBBORN)
    for process in (stubborn, stubborn, other, other):
        assert line(process) == "here"
    on_node = descendants(stubborn.pid)
    assert len(on_node) == 2
    pair.kill_node(1)
    assert not alive(on_node)
    assert stubborn.wait(SECONDS) == -signal.SIGKILL
    assert other.poll() is None
    assert pair.uplink_bytes_sent(1) == 0
    for act in (pair.cut_link, pair.restore_link, lambda node: pair.start_process(node, ["true"])):
        with pytest.raises(ValueError, match="node 1 has been killed"):
            act(1)


@needs_machines
def test_signals_and_exit_codes_are_those_of_the_process(pair: SimulatedCluster) -> None:
    handler = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\nprint('here', flush=True)\n"
    process = python(pair, 0, handler + "signal.pause()")
    assert line(process) == "here"
    process.terminate()
    assert process.wait(SECONDS) == 7
    process.terminate()  # as of any Popen that has ended: nothing
    killed = python(pair, 0, "import signal; signal.pause()")
    killed.kill()
    assert killed.wait(SECONDS) == -signal.SIGKILL


@needs_machines
def test_two_clusters_have_the_same_addresses_and_do_not_meet(pair: SimulatedCluster) -> None:
    with SimulatedCluster(nodes=2) as other:
        sinks = [python(cluster, 1, SINK, 1) for cluster in (pair, other)]
        assert [line(sink) for sink in sinks] == ["listening"] * 2
        said(python(other, 0, SOURCE, "node1", PAYLOAD))
        said(sinks[1])
        assert sinks[0].poll() is None
        assert pair.uplink_bytes_sent(0) < PAYLOAD < other.uplink_bytes_sent(0)


@needs_machines
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_the_block(error: type[BaseException] | None) -> None:
    before = descendants(os.getpid())
    processes: set[int] = set()

    def use() -> None:
        with SimulatedCluster(nodes=2, uplink="100mbit") as cluster:
            assert line(python(cluster, 1, STUBBORN)) == "here"
            processes.update(descendants(os.getpid()) - before)
            if error is not None:
                raise error

    if error is None:
        use()
    else:
        with pytest.raises(error):
            use()
    assert len(processes) >= 3 * 2 + 2  # switch and nodes with their `cat`; nsenter and what it runs
    wait_until(lambda: not alive(processes), SECONDS)  # nsenter is the last


@needs_machines
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_of_a_killed_owner(number: signal.Signals) -> None:
    owner = f"""
import sys, signal
from shoestring.launch.cluster.simulated_cluster import SimulatedCluster
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
with SimulatedCluster(nodes=2, uplink="100mbit") as cluster:
    for node in range(2):
        cluster.start_process(node, [sys.executable, "-I", "-S", "-c", {STUBBORN!r}])
    signal.pause()
"""
    process = subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(4)] == [b"here\n"] * 4
    processes = descendants(process.pid)
    assert len(processes) == 3 * 2 + 2 * 3
    process.send_signal(number)
    process.communicate(timeout=SECONDS)  # ends when the last holder of the pipe has exited
    assert process.returncode != 0
    wait_until(lambda: not alive(processes), SECONDS)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    found = refused(SimulatedCluster, 0, "fast")
    assert "from 1 to 250" in found["nodes"]
    assert "from 1mbit" in found["uplink"]
    assert "package iproute2" in found["tc"]
    assert "must be root" in found["user"]
    assert "from 1mbit" in refused(SimulatedCluster, 2, "900kbit")["uplink"]
