"""Rendezvous of the nodes of a launch, before any of them starts a rank: node 0 listens at MASTER_ADDR:MASTER_PORT.

    node r -> node 0   its number and its fingerprint: configuration, code, data (`fingerprint.py`)
    node 0 -> node r   once all have connected: the run directory, and the content of a file in it
    node r -> node 0   true if it sees that file
    node 0 -> node r   go

Instead of either answer node 0 may send an error, which all nodes receive. A message is one line of JSON.

Ranks that the user's torchrun has started, or a container with torchrun's variables, connect to a store instead. There
too a name that does not resolve is an error, a message says what a rank waits for, the wait has a limit, and a stop
signal ends it.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path

import torch.distributed as dist

from ...comm.bootstrap import TorchrunEnvironment, connect_rendezvous_store
from ...comm.errors import ConfigError, Problem, raise_if_any
from ...comm.files.file_io import config_error_context, read_text, replace_file_atomically
from ...comm.files.strict_json import JsonValue, MalformedFileError
from ...comm.rank_consistency import (
    MISMATCH_HINT,
    Fingerprints,
    describe_mismatch,
    find_first_mismatch,
    fingerprints_from_json,
    fingerprints_to_json,
)
from .node_connection import POLL_SECONDS, SECONDS_TO_SPEAK, NodeConnection, PeriodicMessage, first_messages, listen
from .signals import StoppedBeforeStart
from .torchrun import RanksFailed

_SECONDS_TO_SEE = 60
"""Limit for a file to appear on the other nodes: NFS caches a directory for up to 60 s (acdirmax)."""
_SECONDS_TO_HEAR = 20
"""Time after an error in which further nodes may connect, so that they receive it instead of waiting in vain."""
_SECONDS_TO_REPORT = 20
"""Time in which a node tries to report an error: node 0 has more to check, and listens later than others fail."""
_RANK_POLL_SECONDS = 0.2
_MAX_NOTE_BYTES = 1000
_FILE = "rendezvous"


class RendezvousError(RanksFailed):
    """Nodes did not connect, or disconnected. The input is valid: the same command may succeed later."""


@dataclass(frozen=True)
class RendezvousEndpoint:
    """Address at which the nodes connect, and the number of this node."""

    address: str
    """Address of node 0; empty for a launch of one node."""
    port: int
    node_count: int
    node_rank: int
    """Number of this node. Node 0 runs rank 0 and owns the run directory and the ledger."""
    timeout_seconds: float = 0.0
    """Time to wait for other nodes: `training.rendezvous_timeout_seconds`."""

    @property
    def host_and_port(self) -> str:
        """Address and port."""
        return f"{self.address}:{self.port}"

    @property
    def timeout_text(self) -> str:
        """Timeout with the key that sets it, for messages."""
        return f"{self.timeout_seconds:g} s (training.rendezvous_timeout_seconds)"


def master_address_problems(address: str) -> Iterator[Problem]:
    """Yield a problem if MASTER_ADDR does not resolve on this machine or names no single host."""
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        host, _, port = address.rpartition(":")
        hint = "write an address of node 0 that all nodes can resolve"
        if port.isdecimal() and ":" not in host:
            hint = f"write MASTER_ADDR={host} and MASTER_PORT={port}"
        elif address != (bare := address.strip().strip("[]")):
            hint = f"write {bare}, without spaces and brackets" if bare else hint
        yield Problem("MASTER_ADDR", address, f"does not resolve on this machine ({error}); {hint}")
        return
    if any(ip_address(str(entry[4][0]).partition("%")[0]).is_unspecified for entry in found):
        hint = "is the wildcard address; write an address of node 0 that all nodes can resolve"
        yield Problem("MASTER_ADDR", address, hint)


def host_rendezvous(endpoint: RendezvousEndpoint, fingerprints: Fingerprints, run_dir: Path, attempt: str) -> None:
    """Run the rendezvous on node 0; return when all nodes have connected, match `fingerprints` and share `run_dir`.

    `attempt` is the unique text of the shared file. Raises `ConfigError` for a node that does not match, and
    `RendezvousError` for one that does not connect.
    """
    note, nodes = run_dir / _FILE, dict[int, NodeConnection]()
    with ExitStack() as cleanup:
        with config_error_context(note, "free disk space, or use another training.run_dir"):
            replace_file_atomically(note, attempt.encode())
        cleanup.callback(note.unlink, missing_ok=True)
        listener = cleanup.enter_context(listen(endpoint.address, endpoint.port))
        cleanup.callback(_close, nodes)
        try:
            _register_nodes(endpoint, listener, fingerprints, nodes)
            for node in nodes.values():
                _send(node, {"run_dir": str(run_dir), "attempt": attempt})
            for node in nodes.values():
                _check_shared_file(node, run_dir)
        except ConfigError as error:
            for node in nodes.values():
                with suppress(OSError):
                    node.send({"refused": str(error)})
            raise
        for node in nodes.values():
            _send(node, {"go": True})


def _close(nodes: Mapping[int, NodeConnection]) -> None:
    for node in nodes.values():
        node.connection.close()


def _send(node: NodeConnection, message: Mapping[str, object]) -> None:
    try:
        node.send(message)
    except OSError as error:
        raise RendezvousError(f"{node.name} disconnected ({error.strerror}); see the output of that node") from error


def join_rendezvous(endpoint: RendezvousEndpoint, fingerprints: Fingerprints) -> Path:
    """Connect to node 0; return the run directory of the launch once all nodes have connected and match."""
    peer = _connect(endpoint)
    try:
        peer.send(_introduction(endpoint) | {"fingerprints": fingerprints_to_json(fingerprints)})
        answer = _receive_answer(endpoint, peer)
        run_dir, attempt = _path(answer["run_dir"]), answer["attempt"].as_string()
        peer.send({"sees": _sees_file(run_dir / _FILE, attempt), "where": str(run_dir.absolute())})
        _receive_answer(endpoint, peer)["go"].as_boolean()
    except MalformedFileError as error:
        raise RendezvousError(f"{endpoint.host_and_port} is not node 0 of a Shoestring launch: {error}") from error
    except OSError as error:
        raise RendezvousError(f"lost the connection to node 0 at {endpoint.host_and_port}: {error}") from error
    finally:
        peer.connection.close()
    return run_dir


def _introduction(endpoint: RendezvousEndpoint) -> dict[str, object]:
    return {"node": endpoint.node_rank, "host": socket.gethostname()}


def _path(item: JsonValue) -> Path:
    text = item.as_string()
    if not text or "\0" in text:
        raise item.malformed_error("must be a path")
    return Path(text)


def report_config_error(endpoint: RendezvousEndpoint, error: ConfigError) -> None:
    """Send `error` to node 0, if it listens within `_SECONDS_TO_REPORT`, so that it stops waiting for this node."""
    deadline = time.monotonic() + _SECONDS_TO_REPORT
    while True:
        try:
            connection = socket.create_connection((endpoint.address, endpoint.port), POLL_SECONDS)
            break
        except (ConnectionRefusedError, TimeoutError):
            if time.monotonic() > deadline:
                return
            time.sleep(POLL_SECONDS)
        except OSError:
            return
    with suppress(OSError), connection:
        NodeConnection(connection).send(_introduction(endpoint) | {"refused": str(error)})


def _register_nodes(
    endpoint: RendezvousEndpoint, listener: socket.socket, fingerprints: Fingerprints, nodes: dict[int, NodeConnection]
) -> None:
    """Add every other node to `nodes`. Raises `ConfigError`, after a delay in which the other nodes may connect."""
    deadline, waiting = time.monotonic() + endpoint.timeout_seconds, PeriodicMessage()
    hint = _not_local_hint(endpoint.address)
    errors: list[ConfigError] = []
    with closing(first_messages(listener)) as arrivals:
        while missing := [number for number in range(1, endpoint.node_count) if number not in nodes]:
            names = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
            count = f"{len(missing)} of {endpoint.node_count} nodes"
            waiting.print_if_due(f"waiting for {count} at {endpoint.host_and_port} (missing: {names}){hint}")
            if time.monotonic() > deadline:
                if errors:
                    break
                late = f"{count} did not connect to {endpoint.host_and_port} within {endpoint.timeout_text}"
                advice = "see their output, and check that they can reach that address"
                raise RendezvousError(f"{late} (missing: {names}){hint}; {advice}")
            try:
                if arrived := next(arrivals):
                    _register_node(endpoint, *arrived, fingerprints, nodes)
            except ConfigError as error:
                errors.append(error)
                deadline = min(deadline, time.monotonic() + _SECONDS_TO_HEAR)
    if errors:
        raise errors[0]


def _not_local_hint(address: str) -> str:
    """Return a hint if `address` is not an address of this machine, else an empty text."""
    try:
        for family, _, _, _, socket_address in socket.getaddrinfo(address, 0, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.bind(socket_address)
                return ""
    except OSError:
        return ""
    return f"; {address} is not an address of this machine, which has NODE_RANK=0"


def _register_node(
    endpoint: RendezvousEndpoint,
    peer: NodeConnection,
    message: JsonValue,
    fingerprints: Fingerprints,
    nodes: dict[int, NodeConnection],
) -> None:
    """Add `peer` to `nodes`, or close it if it is not a node of the launch. Raises `ConfigError` for a mismatch."""
    try:
        number, host = message["node"].as_integer(1, endpoint.node_count - 1), message["host"].as_string()
        item = message.get("refused")
        its_error = None if item is None else item.as_string()
        theirs = {} if its_error is not None else fingerprints_from_json(message["fingerprints"].as_string())
    except ValueError:
        peer.connection.close()
        return
    if number in nodes:
        nodes[number].connection.close()  # the node was restarted
    nodes[number], peer.name = peer, f"node {number} ({host})"
    if its_error is not None:
        raise ConfigError([Problem(f"node {number}", host, f"reported an error: {its_error}")])
    name = find_first_mismatch(fingerprints, theirs)
    if name is not None:
        here = f"node 0 ({socket.gethostname()})"
        raise ConfigError(
            [Problem(name, describe_mismatch(name, (here, fingerprints), (peer.name, theirs)), MISMATCH_HINT)]
        )


def _check_shared_file(node: NodeConnection, run_dir: Path) -> None:
    try:
        message = node.receive(_SECONDS_TO_SEE + SECONDS_TO_SPEAK)
    except (OSError, ValueError) as error:
        raise RendezvousError(f"{node.name} has stopped answering: {error}") from error
    if message is None:
        raise RendezvousError(f"{node.name} disconnected; see the output of that node")
    tree = message.as_mapping()
    if tree.get("sees") is not True:
        hint = (
            f"is not shared: {node.name} does not see in {tree.get('where')} the file that node 0 "
            f"wrote in {run_dir.absolute()}; use a directory on a file system that all nodes share"
        )
        raise ConfigError([Problem("training.run_dir", str(run_dir), hint)])


def _sees_file(note: Path, attempt: str) -> bool:
    """Return whether `note` holds `attempt`; wait for it, since a network file system may show it late."""
    is_there = False
    with suppress(OSError):
        is_there = note.parent.is_dir()
    deadline = time.monotonic() + (_SECONDS_TO_SEE if is_there else POLL_SECONDS)
    while True:
        with suppress(OSError, MalformedFileError):
            names = {path.name for path in note.parent.iterdir()}
            if note.name in names and read_text(note, _MAX_NOTE_BYTES) == attempt:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)


def _connect(endpoint: RendezvousEndpoint) -> NodeConnection:
    deadline, waiting = time.monotonic() + endpoint.timeout_seconds, PeriodicMessage()
    while True:
        try:
            seconds = min(SECONDS_TO_SPEAK, max(0.1, deadline - time.monotonic()))
            connection = socket.create_connection((endpoint.address, endpoint.port), seconds)
        except OSError as error:
            waiting.print_if_due(f"waiting for node 0 at {endpoint.host_and_port} ({error.strerror or error})")
            if time.monotonic() > deadline:
                hint = "check MASTER_ADDR and MASTER_PORT, and see the output of node 0"
                raise RendezvousError(
                    f"node 0 did not listen at {endpoint.host_and_port} within {endpoint.timeout_text}; {hint}"
                ) from error
            time.sleep(POLL_SECONDS)
        else:
            return NodeConnection(connection)


def _receive_answer(endpoint: RendezvousEndpoint, peer: NodeConnection) -> JsonValue:
    """Return node 0's next message.

    Raises `ConfigError` that node 0 reports, `RendezvousError`, and `MalformedFileError` for anything but a message.
    """
    deadline, waiting = time.monotonic() + endpoint.timeout_seconds + _SECONDS_TO_SEE, PeriodicMessage()
    while time.monotonic() < deadline:
        try:
            message = peer.receive(POLL_SECONDS)
        except TimeoutError:
            others = f"waiting until all {endpoint.node_count} nodes have connected"
            waiting.print_if_due(f"connected to node 0 at {endpoint.host_and_port}; {others}")
            continue
        if message is None:
            raise RendezvousError(f"node 0 at {endpoint.host_and_port} ended the launch; see the output of node 0")
        if "refused" in message:
            reason = message["refused"].as_string()
            raise ConfigError([Problem("node 0", endpoint.host_and_port, f"reported an error: {reason}")])
        return message
    raise RendezvousError(
        f"node 0 at {endpoint.host_and_port} did not answer within {endpoint.timeout_text}; see the output of node 0"
    )


def open_rendezvous_store(
    worker: TorchrunEnvironment, seconds: float, stop_requested: Callable[[], bool]
) -> dist.Store:
    """Return the store at MASTER_ADDR:MASTER_PORT once every rank has connected to it.

    Raises `ConfigError` if the address does not resolve, `dist.DistError` or `OSError` if ranks do not connect within
    `seconds`, and `StoppedBeforeStart`.
    """
    raise_if_any(master_address_problems(os.environ["MASTER_ADDR"]))
    stores: list[dist.Store] = []
    errors: list[dist.DistError | OSError] = []

    def open_it() -> None:
        try:
            stores.append(connect_rendezvous_store(worker, timedelta(seconds=seconds)))
        except (dist.DistError, OSError) as error:
            errors.append(error)

    # torch waits in C++, where Python handles no signal, so the wait is in another thread.
    opening = threading.Thread(target=open_it, daemon=True, name="rendezvous")
    opening.start()
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    message = PeriodicMessage(first_after=_RANK_POLL_SECONDS)
    while opening.is_alive():
        if stop_requested():
            raise StoppedBeforeStart(f"stopped before all {worker.world_size} ranks had connected at {where}")
        if worker.local_rank == 0:
            others = worker.world_size - 1
            message.print_if_due(
                f"rank {worker.rank} waits for {others} other rank{'s' if others > 1 else ''} at {where}"
            )
        opening.join(_RANK_POLL_SECONDS)
    if errors:
        raise errors[0]
    return stores[0]
