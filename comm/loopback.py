"""Loopback addresses of this machine, and sockets that no other machine reaches."""

import socket
from ipaddress import ip_address

from .errors import ConfigError, Problem

_ADDRESSES = ("127.0.0.1", "::1")
_SECONDS = 5
_BACKLOG = 2048
"""Connections that may wait to be accepted: all ranks of a machine connect at the same time."""


def find_loopback_address() -> str:
    """Return a numeric address at which this machine reaches itself. Raises `ConfigError` if there is none."""
    reasons = []
    # Tried by a real connection: in a network namespace the loopback interface may exist and be down.
    for address in _ADDRESSES:
        try:
            with (
                open_listening_socket(address) as listener,
                socket.socket(listener.family, socket.SOCK_STREAM) as caller,
            ):
                caller.settimeout(_SECONDS)
                caller.connect(listener.getsockname())
        except OSError as error:
            reasons.append(f"{address}: {error.strerror or error}")
        else:
            return address
    hint = f"this machine cannot reach itself ({'; '.join(reasons)}); bring its loopback up: `ip link set lo up`"
    raise ConfigError([Problem("localhost", _ADDRESSES[0], hint)])


def open_listening_socket(address: str, port: int = 0) -> socket.socket:
    """Return a socket that listens only on `address`; port 0 takes a free one. Raises `OSError`."""
    family = socket.AF_INET6 if ip_address(address).version == 6 else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def resolve_to_loopback(host: str) -> str | None:
    """Return the loopback address of `host`; None if it has any other address, or none."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return None
    loopback = [address for address in _ADDRESSES if address in found]
    return loopback[0] if loopback and all(ip_address(each.partition("%")[0]).is_loopback for each in found) else None
