"""This machine's loopback address, and ports that no other machine reaches."""

import socket
from collections.abc import Iterator

import pytest

from shoestring.comm import loopback
from shoestring.comm.errors import ConfigError
from shoestring.comm.loopback import find_loopback_address, open_listening_socket, resolve_to_loopback


def test_this_machine_is_reached_by_an_address_and_not_by_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_names(*arguments: object, **options: object) -> Iterator[object]:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_names)
    assert find_loopback_address() == "127.0.0.1"
    assert resolve_to_loopback("localhost") is None


def test_a_machine_that_cannot_reach_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loopback, "_ADDRESSES", ("192.0.2.1", "2001:db8::1"))  # of no machine
    with pytest.raises(ConfigError, match=r"localhost = .*cannot reach itself .*192.0.2.1: .*ip link set lo up"):
        find_loopback_address()


@pytest.mark.parametrize(("host", "address"), [("127.0.0.1", "127.0.0.1"), ("192.0.2.1", None), ("0.0.0.0", None)])
def test_which_hosts_are_loopback(host: str, address: str | None) -> None:
    assert resolve_to_loopback(host) == address


def test_a_port_is_listened_to_once() -> None:
    with open_listening_socket("127.0.0.1") as first, pytest.raises(OSError, match="in use"):
        open_listening_socket("127.0.0.1", first.getsockname()[1])
