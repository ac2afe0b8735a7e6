"""Rendezvous of the nodes of a launch, before any of them starts a rank: node 0 listens at MASTER_ADDR:MASTER_PORT.

    node r -> node 0   its number and its fingerprint: configuration, code, data (`fingerprint.py`)
    node 0 -> node r   once all have connected: the run directory, and the content of a file in it
    node r -> node 0   true if it sees that file
    node 0 -> node r   go

Instead of either answer node 0 may send an error, which all nodes receive. A message is one line of JSON.
"""

from __future__ import annotations

import errno
import json
import selectors
import socket
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from ...comm.errors import ConfigError, Problem
from ...comm.files.file_io import config_error_context, read_text, replace_file_atomically
from ...comm.files.strict_json import JsonValue, MalformedFileError, parse_json
from ...comm.loopback import open_listening_socket, resolve_to_loopback
from ...comm.rank_consistency import (
    MISMATCH_HINT,
    Fingerprints,
    describe_mismatch,
    find_first_mismatch,
    fingerprints_from_json,
    fingerprints_to_json,
)
from ..console import print_to_stderr

_MESSAGE_INTERVAL_SECONDS = 30
_POLL_SECONDS = 0.5
_SECONDS_TO_SPEAK = 10
"""Limit for a connected node to send its message; within one network it takes milliseconds."""
_SECONDS_TO_SEE = 60
"""Limit for a file to appear on the other nodes: NFS caches a directory for up to 60 s (acdirmax)."""
_SECONDS_TO_HEAR = 20
"""Time after an error in which further nodes may connect, so that they receive it instead of waiting in vain."""
_SECONDS_FOR_PORT = 20
_SECONDS_TO_REPORT = 20
"""Time in which a node tries to report an error: node 0 has more to check, and listens later than others fail."""
_MAX_BYTES = 4 * 2**20
_MAX_UNIDENTIFIED = 256
"""Limit on connections that have not sent their message; a node sends it within milliseconds."""
_MAX_NOTE_BYTES = 1000
_FILE = "rendezvous"


class RendezvousError(Exception):
    """Nodes did not connect, or disconnected. The input is valid: the same command may succeed later."""


@dataclass(frozen=True)
class RendezvousEndpoint:
    """Address at which the nodes connect, and the number of this node."""

    address: str
    port: int
    node_count: int
    node_rank: int
    """Number of this node."""
    timeout_seconds: float
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
    note, nodes = run_dir / _FILE, dict[int, _Connection]()
    with ExitStack() as cleanup:
        with config_error_context(note, "free disk space, or use another training.run_dir"):
            replace_file_atomically(note, attempt.encode())
        cleanup.callback(note.unlink, missing_ok=True)
        listener = cleanup.enter_context(_listener(endpoint))
        cleanup.callback(lambda: [node.connection.close() for node in nodes.values()])
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


def _send(node: _Connection, message: Mapping[str, object]) -> None:
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
            connection = socket.create_connection((endpoint.address, endpoint.port), _POLL_SECONDS)
            break
        except (ConnectionRefusedError, TimeoutError):
            if time.monotonic() > deadline:
                return
            time.sleep(_POLL_SECONDS)
        except OSError:
            return
    with suppress(OSError), connection:
        _Connection(connection).send(_introduction(endpoint) | {"refused": str(error)})


@dataclass(eq=False)
class _Connection:
    """Connection to another node that sends and receives lines of JSON."""

    connection: socket.socket
    name: str = "?"
    """Number and host of the other node, for messages."""
    _rest: bytes = b""

    def send(self, message: Mapping[str, object]) -> None:
        self.connection.settimeout(_SECONDS_TO_SPEAK)
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float) -> JsonValue | None:
        """Return the next message, a mapping; None if the other side has closed the connection.

        With 0 seconds, only bytes that have arrived are read. Raises `TimeoutError`, and `MalformedFileError` for
        anything but a JSON object.
        """
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            self.connection.settimeout(max(0.001, deadline - time.monotonic()))
            data = self.connection.recv(2**16)
            if not data:
                return None
            self._rest += data
            if len(self._rest) > _MAX_BYTES:
                raise MalformedFileError("", len(self._rest), "is too long for a message")
            if b"\n" not in self._rest and time.monotonic() >= deadline:
                raise TimeoutError
        text, _, self._rest = self._rest.partition(b"\n")
        message = parse_json(text)
        message.as_mapping()
        return message


class PeriodicMessage:
    """Message on a wait, printed `first_after` seconds from now and every 30 seconds."""

    def __init__(self, first_after: float = 0) -> None:
        self._next = time.monotonic() + first_after

    def print_if_due(self, text: str) -> None:
        """Print `text` if it is due."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _MESSAGE_INTERVAL_SECONDS
            print_to_stderr(f"shoestring train: {text}")


@contextmanager
def _listener(endpoint: RendezvousEndpoint) -> Iterator[socket.socket]:
    """Listen on every address of this machine, or only on its loopback address if that is MASTER_ADDR."""
    deadline = time.monotonic() + _SECONDS_FOR_PORT
    while True:
        try:
            listener = _listen(endpoint)
            break
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                hint = f"cannot be opened on this machine ({error.strerror}); use another port, the same on all nodes"
                raise ConfigError([Problem("MASTER_PORT", endpoint.port, hint)]) from error
        time.sleep(_POLL_SECONDS)  # the previous launch, or another program, still has the port
    with listener:
        listener.setblocking(False)
        yield listener


def _listen(endpoint: RendezvousEndpoint) -> socket.socket:
    loopback = resolve_to_loopback(endpoint.address)
    if loopback is not None:
        return open_listening_socket(loopback, endpoint.port)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", endpoint.port), family=family, dualstack_ipv6=both, backlog=2048)


def _first_messages(listener: socket.socket) -> Generator[tuple[_Connection, JsonValue] | None]:
    """Yield each new connection with its first message, and None after every poll.

    Connections are polled together, so that a silent one delays no other. Those that send anything else are closed
    without an error, since a port may be scanned.
    """
    deadlines: dict[_Connection, float] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)

        def forget(peer: _Connection) -> None:
            selector.unregister(peer.connection)
            del deadlines[peer]

        def close(peer: _Connection) -> None:
            forget(peer)
            peer.connection.close()

        try:
            while True:
                for key, _ in selector.select(_POLL_SECONDS):
                    if key.data is None:
                        with suppress(OSError):  # it may have disconnected already
                            peer = _Connection(listener.accept()[0])
                            if len(deadlines) >= _MAX_UNIDENTIFIED:
                                close(next(iter(deadlines)))
                            deadlines[peer] = time.monotonic() + _SECONDS_TO_SPEAK
                            selector.register(peer.connection, selectors.EVENT_READ, peer)
                    elif key.data in deadlines:
                        try:
                            message = key.data.receive(0)
                        except TimeoutError:
                            continue  # a part of a message
                        except (OSError, ValueError):
                            message = None
                        if message is None:
                            close(key.data)
                        else:
                            forget(key.data)
                            yield key.data, message
                for peer in [peer for peer, deadline in deadlines.items() if time.monotonic() > deadline]:
                    close(peer)
                yield None
        finally:
            for peer in deadlines:
                peer.connection.close()


def _register_nodes(
    endpoint: RendezvousEndpoint, listener: socket.socket, fingerprints: Fingerprints, nodes: dict[int, _Connection]
) -> None:
    """Add every other node to `nodes`. Raises `ConfigError`, after a delay in which the other nodes may connect."""
    deadline, waiting = time.monotonic() + endpoint.timeout_seconds, PeriodicMessage()
    hint = _not_local_hint(endpoint.address)
    errors: list[ConfigError] = []
    with closing(_first_messages(listener)) as arrivals:
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
    peer: _Connection,
    message: JsonValue,
    fingerprints: Fingerprints,
    nodes: dict[int, _Connection],
) -> None:
    """Add `peer` to `nodes`, or close it if it is not a node of the launch. Raises `ConfigError` for a mismatch."""
    try:
        number, host = message["node"].as_integer(1, endpoint.node_count - 1), message["host"].as_string()
        item = message.get("refused")
        its_error = None if item is None else item.as_string()
        theirs = {} if its_error is not None else fingerprints_from_json(message["fingerprints"].as_string())
    except (ValueError, KeyError):
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


def _check_shared_file(node: _Connection, run_dir: Path) -> None:
    try:
        message = node.receive(_SECONDS_TO_SEE + _SECONDS_TO_SPEAK)
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
    deadline = time.monotonic() + (_SECONDS_TO_SEE if is_there else _POLL_SECONDS)
    while True:
        with suppress(OSError, MalformedFileError):
            names = {path.name for path in note.parent.iterdir()}
            if note.name in names and read_text(note, _MAX_NOTE_BYTES) == attempt:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)


def _connect(endpoint: RendezvousEndpoint) -> _Connection:
    deadline, waiting = time.monotonic() + endpoint.timeout_seconds, PeriodicMessage()
    while True:
        try:
            seconds = min(_SECONDS_TO_SPEAK, max(0.1, deadline - time.monotonic()))
            connection = socket.create_connection((endpoint.address, endpoint.port), seconds)
        except OSError as error:
            waiting.print_if_due(f"waiting for node 0 at {endpoint.host_and_port} ({error.strerror or error})")
            if time.monotonic() > deadline:
                hint = "check MASTER_ADDR and MASTER_PORT, and see the output of node 0"
                raise RendezvousError(
                    f"node 0 did not listen at {endpoint.host_and_port} within {endpoint.timeout_text}; {hint}"
                ) from error
            time.sleep(_POLL_SECONDS)
        else:
            return _Connection(connection)


def _receive_answer(endpoint: RendezvousEndpoint, peer: _Connection) -> JsonValue:
    """Return node 0's next message.

    Raises `ConfigError` that node 0 reports, `RendezvousError`, and `MalformedFileError` for anything but a message.
    """
    deadline, waiting = time.monotonic() + endpoint.timeout_seconds + _SECONDS_TO_SEE, PeriodicMessage()
    while time.monotonic() < deadline:
        try:
            message = peer.receive(_POLL_SECONDS)
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
