"""Connections between the nodes of a launch: lines of JSON over TCP, and a port that strangers may reach too."""

import errno
import json
import selectors
import socket
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from ...comm.errors import ConfigError, Problem
from ...comm.files.strict_json import JsonValue, MalformedFileError, parse_json
from ...comm.loopback import open_listening_socket, resolve_to_loopback
from ..console import print_to_stderr

POLL_SECONDS = 0.5
SECONDS_TO_SPEAK = 10
"""Limit for a connected node to send its message; within one network it takes milliseconds."""
_MESSAGE_INTERVAL_SECONDS = 30
_SECONDS_FOR_PORT = 20
_MAX_BYTES = 4 * 2**20
_MAX_UNIDENTIFIED = 256
"""Limit on connections that have not sent their message; a node sends it within milliseconds."""


@dataclass(eq=False)
class NodeConnection:
    """Connection to another node that sends and receives lines of JSON."""

    connection: socket.socket
    name: str = "?"
    """Number and host of the other node, for messages."""
    _rest: bytes = b""

    def send(self, message: Mapping[str, object]) -> None:
        """Send one message. Raises `OSError`."""
        self.connection.settimeout(SECONDS_TO_SPEAK)
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


def first_messages(listener: socket.socket) -> Generator[tuple[NodeConnection, JsonValue] | None]:
    """Yield each new connection with its first message, and None after every poll.

    Connections are polled together, so that a silent one delays no other. Those that send anything else are closed
    without an error, since a port may be scanned.
    """
    deadlines: dict[NodeConnection, float] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)

        def forget(peer: NodeConnection) -> None:
            selector.unregister(peer.connection)
            del deadlines[peer]

        def close(peer: NodeConnection) -> None:
            forget(peer)
            peer.connection.close()

        try:
            while True:
                for key, _ in selector.select(POLL_SECONDS):
                    if key.data is None:
                        with suppress(OSError):  # it may have disconnected already
                            peer = NodeConnection(listener.accept()[0])
                            if len(deadlines) >= _MAX_UNIDENTIFIED:
                                close(next(iter(deadlines)))
                            deadlines[peer] = time.monotonic() + SECONDS_TO_SPEAK
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


@contextmanager
def listen(address: str, port: int) -> Iterator[socket.socket]:
    """Listen on every address of this machine, or only on its loopback address if that is MASTER_ADDR."""
    deadline = time.monotonic() + _SECONDS_FOR_PORT
    while True:
        try:
            listener = _open_listener(address, port)
            break
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                hint = f"cannot be opened on this machine ({error.strerror}); use another port, the same on all nodes"
                raise ConfigError([Problem("MASTER_PORT", port, hint)]) from error
        time.sleep(POLL_SECONDS)  # the previous launch, or another program, still has the port
    with listener:
        listener.setblocking(False)
        yield listener


def _open_listener(address: str, port: int) -> socket.socket:
    loopback = resolve_to_loopback(address)
    if loopback is not None:
        return open_listening_socket(loopback, port)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=2048)


class PeriodicMessage:
    """Message on a wait, printed `first_after` seconds from now and every 30 seconds."""

    def __init__(self, first_after: float = 0) -> None:
        self._next = time.monotonic() + first_after

    def print_if_due(self, text: str) -> None:
        """Print `text` if it is due."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _MESSAGE_INTERVAL_SECONDS
            print_to_stderr(f"shoestring train: {text}")
