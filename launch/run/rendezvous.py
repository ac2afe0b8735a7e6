"""The machines of a launch meet before any of them starts a rank: machine 0 waits at MASTER_ADDR:MASTER_PORT.

    machine r -> machine 0   who it is, and its facts: configuration, code, data (`identity.py`)
    machine 0 -> machine r   once all have come: the run directory, and what a file in it holds
    machine r -> machine 0   whether it sees that file
    machine 0 -> machine r   go

In the place of each answer of machine 0 may come a refusal, which all machines get. A message is a line of JSON.
"""

from __future__ import annotations

import errno
import json
import selectors
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
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

_SECONDS_BETWEEN_WORDS = 30
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_TO_SPEAK = 10
"""For a machine that has connected to send its line: on one machine and in one network this takes milliseconds."""
_SECONDS_TO_SEE = 60
"""For a file to appear on the other machines: NFS looks again after 60 s (acdirmax)."""
_SECONDS_TO_HEAR = 20
"""For machines that are about to come, when one that has come is refused: they would wait for nobody."""
_SECONDS_FOR_PORT = 20
_SECONDS_TO_REPORT = 20
"""Machines are started together, and machine 0 listens later than another one refuses: it looks at more."""
_MOST_BYTES = 4 * 2**20
_MOST_NEWCOMERS = 256
"""Connections that have not said yet who they are: a machine does so within milliseconds."""
_MOST_NOTE_BYTES = 1000
_FILE = "meeting"


class RendezvousError(Exception):
    """Machines did not come, or have left again. Not the input's fault: the same command may do."""


@dataclass(frozen=True)
class RendezvousEndpoint:
    """Where the machines meet, and which of them this is."""

    address: str
    port: int
    node_count: int
    node_rank: int
    """Number of this one."""
    timeout_seconds: float
    """How long to wait: `training.rendezvous_timeout_seconds`."""

    @property
    def host_and_port(self) -> str:
        """Address and port."""
        return f"{self.address}:{self.port}"

    @property
    def timeout_text(self) -> str:
        """The limit, with the key that sets it."""
        return f"{self.timeout_seconds:g} s (training.rendezvous_timeout_seconds)"


def master_address_problems(address: str) -> Iterator[Problem]:
    """What keeps this machine from finding machine 0: its name does not resolve, or names none."""
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        host, _, port = address.rpartition(":")
        hint = "name machine 0 by an address that all machines know"
        if port.isdecimal() and ":" not in host:
            hint = f"write MASTER_ADDR={host} and MASTER_PORT={port}"
        elif address != (bare := address.strip().strip("[]")):
            hint = f"write {bare}, without spaces and brackets" if bare else hint
        yield Problem("MASTER_ADDR", address, f"does not resolve on this machine ({error}); {hint}")
        return
    if any(ip_address(str(entry[4][0]).partition("%")[0]).is_unspecified for entry in found):
        hint = "is every address of a machine and names none; name machine 0 by an address that all machines know"
        yield Problem("MASTER_ADDR", address, hint)


def host_rendezvous(venue: RendezvousEndpoint, facts: Fingerprints, run_dir: Path, attempt: str) -> None:
    """As machine 0: return when all machines are there, fit, and see what `run_dir` holds; `attempt` is in no other.

    Raises `ConfigError` for one that does not fit, `RendezvousError` for one that does not come.
    """
    with ExitStack() as cleanup:
        note = run_dir / _FILE
        with config_error_context(note, "make room, or name another training.run_dir"):
            replace_file_atomically(note, attempt.encode())
        cleanup.callback(lambda: note.unlink(missing_ok=True))
        listener = cleanup.enter_context(_listener(venue))
        guests: dict[int, _Line] = {}
        cleanup.callback(_close, guests)
        try:
            _gather(venue, listener, facts, guests)
            for number, guest in guests.items():
                _send(number, guest, {"run_dir": str(run_dir), "attempt": attempt})
            for number, guest in guests.items():
                _check_sight(number, guest, run_dir)
        except ConfigError as refused:
            for guest in guests.values():
                with suppress(OSError):
                    guest.send({"refused": str(refused)})
            raise
        for number, guest in guests.items():
            _send(number, guest, {"go": True})


def _send(number: int, guest: _Line, message: Mapping[str, object]) -> None:
    try:
        guest.send(message)
    except OSError as error:
        raise RendezvousError(
            f"machine {number} ({guest.host}) has left ({error.strerror}); look what it says"
        ) from error


def _close(guests: Mapping[int, _Line]) -> None:
    for guest in guests.values():
        guest.close()


def join_rendezvous(venue: RendezvousEndpoint, facts: Fingerprints) -> Path:
    """As another machine: return the run directory of the launch once all machines are there and fit."""
    line = _reach(venue)
    try:
        line.send({"machine": venue.node_rank, "host": socket.gethostname(), "facts": fingerprints_to_json(facts)})
        told = _answer(venue, line)
        run_dir, attempt = _path(told["run_dir"]), told["attempt"].as_string()
        line.send({"sees": _sees(run_dir / _FILE, attempt), "where": str(run_dir.absolute())})
        _answer(venue, line)["go"].as_boolean()
    except MalformedFileError as error:
        raise RendezvousError(f"what answers at {venue.host_and_port} is no launch of Shoestring: {error}") from error
    except OSError as error:
        raise RendezvousError(f"machine 0 at {venue.host_and_port} cannot be reached any more: {error}") from error
    finally:
        line.close()
    return run_dir


def _path(item: JsonValue) -> Path:
    text = item.as_string()
    if not text or "\0" in text:
        raise item.malformed_error("must be a path")
    return Path(text)


def report_config_error(venue: RendezvousEndpoint, refused: ConfigError) -> None:
    """Tell machine 0, if it waits or begins to within seconds, that this machine will not come."""
    deadline = time.monotonic() + _SECONDS_TO_REPORT
    while True:
        try:
            connection = socket.create_connection((venue.address, venue.port), _SECONDS_BETWEEN_LOOKS)
            break
        except (ConnectionRefusedError, TimeoutError):
            if time.monotonic() > deadline:
                return
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        except OSError:
            return
    with suppress(OSError):
        line = _Line(connection)
        line.send({"machine": venue.node_rank, "host": socket.gethostname(), "refused": str(refused)})
        line.close()


@dataclass(eq=False)
class _Line:
    """One connection: a line of JSON at a time."""

    connection: socket.socket
    host: str = "?"
    _rest: bytes = field(default=b"")

    def send(self, message: Mapping[str, object]) -> None:
        self.connection.settimeout(_SECONDS_TO_SPEAK)
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float) -> JsonValue | None:
        """The next message, a mapping; None where the other side has closed.

        With 0 seconds, only what has come already is looked at. Raises `TimeoutError`, and `MalformedFileError` for junk.
        """
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            self.connection.settimeout(max(0.001, deadline - time.monotonic()))
            got = self.connection.recv(2**16)
            if not got:
                return None
            self._rest += got
            if len(self._rest) > _MOST_BYTES:
                raise MalformedFileError("", len(self._rest), "is too long for a message")
            if b"\n" not in self._rest and time.monotonic() >= deadline:
                raise TimeoutError
        text, _, self._rest = self._rest.partition(b"\n")
        message = parse_json(text)
        message.as_mapping()
        return message

    def close(self) -> None:
        self.connection.close()


class PeriodicMessage:
    """Says what is waited for, `first_after` seconds from now and every 30 seconds."""

    def __init__(self, first_after: float = 0) -> None:
        self._next = time.monotonic() + first_after

    def print_if_due(self, text: str) -> None:
        """Say `text` where it is time."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _SECONDS_BETWEEN_WORDS
            print_to_stderr(f"shoestring train: {text}")


@contextmanager
def _listener(venue: RendezvousEndpoint) -> Iterator[socket.socket]:
    """On every address of this machine, or on its loopback alone where that is where the machines meet."""
    deadline = time.monotonic() + _SECONDS_FOR_PORT
    while True:
        try:
            listener = _listen(venue)
            break
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                hint = f"cannot be listened to on this machine ({error.strerror}); name another port, the same on all"
                raise ConfigError([Problem("MASTER_PORT", venue.port, hint)]) from error
        time.sleep(_SECONDS_BETWEEN_LOOKS)  # the launch before this one, or another program, still has the port
    with listener:
        listener.setblocking(False)
        yield listener


def _listen(venue: RendezvousEndpoint) -> socket.socket:
    loopback = resolve_to_loopback(venue.address)
    if loopback is not None:
        return open_listening_socket(loopback, venue.port)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", venue.port), family=family, dualstack_ipv6=both, backlog=2048)


class _Newcomers:
    """Connections that have not said yet who they are, all waited for at once: a silent one delays no other."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._deadlines: dict[_Line, float] = {}

    def __enter__(self) -> _Newcomers:
        return self

    def __exit__(self, *_: object) -> None:
        for line in self._deadlines:
            line.close()
        self._selector.close()

    def wait_for_messages(self, seconds: float) -> Iterator[tuple[_Line, JsonValue]]:
        """Yield each connection that says something within `seconds`, with what it says.

        What does not speak our language is let go without a word: a port may be scanned.
        """
        for key, _ in self._selector.select(max(0.0, seconds)):
            if key.data is None:
                self._accept()
            elif key.data in self._deadlines:
                yield from self._heard(key.data)
        late = [line for line, deadline in self._deadlines.items() if time.monotonic() > deadline]
        for line in late:
            self._forget(line).close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has left already
            return
        if len(self._deadlines) >= _MOST_NEWCOMERS:
            self._forget(next(iter(self._deadlines))).close()
        line = _Line(connection)
        self._deadlines[line] = time.monotonic() + _SECONDS_TO_SPEAK
        self._selector.register(connection, selectors.EVENT_READ, line)

    def _heard(self, line: _Line) -> Iterator[tuple[_Line, JsonValue]]:
        try:
            message = line.receive(0)
        except TimeoutError:
            return  # a part of a message
        except (OSError, ValueError):
            message = None
        self._forget(line)
        if message is None:
            line.close()
        else:
            yield line, message

    def _forget(self, line: _Line) -> _Line:
        self._selector.unregister(line.connection)
        del self._deadlines[line]
        return line


def _gather(venue: RendezvousEndpoint, listener: socket.socket, facts: Fingerprints, guests: dict[int, _Line]) -> None:
    """Until every other machine is among the `guests`. Raises `ConfigError`, once most of them are there to hear it."""
    with _Newcomers(listener) as newcomers:
        _gather_from(newcomers, venue, facts, guests)


def _gather_from(
    newcomers: _Newcomers, venue: RendezvousEndpoint, facts: Fingerprints, guests: dict[int, _Line]
) -> None:
    deadline, words, hint = time.monotonic() + venue.timeout_seconds, PeriodicMessage(), _foreign(venue.address)
    refusals: list[ConfigError] = []
    while len(guests) < venue.node_count - 1:
        missing = [number for number in range(1, venue.node_count) if number not in guests]
        some = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        words.print_if_due(
            f"waiting for {len(missing)} of {venue.node_count} machines at {venue.host_and_port} (missing: {some}){hint}"
        )
        if refusals and time.monotonic() > deadline:
            break
        if time.monotonic() > deadline:
            late = f"of {venue.node_count} machines, {some} did not come to {venue.host_and_port} within {venue.timeout_text}{hint}"
            raise RendezvousError(f"{late}; look what they say, and whether they reach that address")
        for line, message in newcomers.wait_for_messages(min(_SECONDS_BETWEEN_LOOKS, deadline - time.monotonic())):
            try:
                _welcome(venue, line, message, facts, guests)
            except ConfigError as refused:
                refusals.append(refused)
                deadline = min(deadline, time.monotonic() + _SECONDS_TO_HEAR)
    if refusals:
        raise refusals[0]


def _foreign(address: str) -> str:
    """A word on an address that is not of this machine, as far as it knows."""
    try:
        for family, _, _, _, place in socket.getaddrinfo(address, 0, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.bind(place)
                return ""
    except OSError:
        return ""
    return f"; {address} is no address of this machine, which has NODE_RANK=0"


def _welcome(
    venue: RendezvousEndpoint, line: _Line, message: JsonValue, facts: Fingerprints, guests: dict[int, _Line]
) -> None:
    """Note who has come; let go what is no machine of the launch."""
    try:
        number, line.host = message["machine"].as_integer(1, venue.node_count - 1), message["host"].as_string()
        said = message.get("refused")
        refused = None if said is None else said.as_string()
        theirs = {} if refused is not None else fingerprints_from_json(message["facts"].as_string())
    except (ValueError, KeyError):
        line.close()
        return
    if number in guests:
        guests[number].close()  # it was started again
    guests[number] = line
    who = f"machine {number} ({line.host})"
    if refused is not None:
        raise ConfigError([Problem(f"machine {number}", line.host, f"was refused there: {refused}")])
    name = find_first_mismatch(facts, theirs)
    if name is not None:
        here = f"machine 0 ({socket.gethostname()})"
        raise ConfigError([Problem(name, describe_mismatch(name, (here, facts), (who, theirs)), MISMATCH_HINT)])


def _check_sight(number: int, guest: _Line, run_dir: Path) -> None:
    try:
        message = guest.receive(_SECONDS_TO_SEE + _SECONDS_TO_SPEAK)
    except (OSError, ValueError) as error:
        raise RendezvousError(f"machine {number} ({guest.host}) has stopped answering: {error}") from error
    if message is None:
        raise RendezvousError(f"machine {number} ({guest.host}) has left; look what it says")
    tree = message.as_mapping()
    if tree.get("sees") is not True:
        hint = (
            f"is not shared: machine {number} ({guest.host}) does not see in {tree.get('where')} what machine 0 "
            f"wrote in {run_dir.absolute()}; name a directory on a file system that all machines share"
        )
        raise ConfigError([Problem("training.run_dir", str(run_dir), hint)])


def _sees(note: Path, attempt: str) -> bool:
    """Whether `note` holds `attempt`, or does so soon: a network file system may show it late."""
    is_there = False
    with suppress(OSError):
        is_there = note.parent.is_dir()
    deadline = time.monotonic() + (_SECONDS_TO_SEE if is_there else _SECONDS_BETWEEN_LOOKS)
    while True:
        with suppress(OSError, MalformedFileError):
            names = {path.name for path in note.parent.iterdir()}
            if note.name in names and read_text(note, _MOST_NOTE_BYTES) == attempt:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _reach(venue: RendezvousEndpoint) -> _Line:
    deadline, words = time.monotonic() + venue.timeout_seconds, PeriodicMessage()
    while True:
        try:
            seconds = min(_SECONDS_TO_SPEAK, max(0.1, deadline - time.monotonic()))
            connection = socket.create_connection((venue.address, venue.port), seconds)
        except OSError as error:
            words.print_if_due(f"waiting for machine 0 at {venue.host_and_port} ({error.strerror or error})")
            if time.monotonic() > deadline:
                hint = "check MASTER_ADDR and MASTER_PORT, and look what machine 0 says"
                raise RendezvousError(
                    f"machine 0 was not at {venue.host_and_port} within {venue.timeout_text}; {hint}"
                ) from error
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        else:
            return _Line(connection)


def _answer(venue: RendezvousEndpoint, line: _Line) -> JsonValue:
    """What machine 0 says next. Raises `ConfigError`, `RendezvousError`, and `MalformedFileError` for what no machine 0 says."""
    deadline, words = time.monotonic() + venue.timeout_seconds + _SECONDS_TO_SEE, PeriodicMessage()
    while time.monotonic() < deadline:
        try:
            message = line.receive(_SECONDS_BETWEEN_LOOKS)
        except TimeoutError:
            words.print_if_due(
                f"has reached machine 0 at {venue.host_and_port}; waiting until all {venue.node_count} machines are there"
            )
            continue
        if message is None:
            raise RendezvousError(f"machine 0 at {venue.host_and_port} has ended the launch; look what it says")
        if "refused" in message:
            words_of_0 = message["refused"].as_string()
            raise ConfigError([Problem("machine 0", venue.host_and_port, f"has refused the launch: {words_of_0}")])
        return message
    raise RendezvousError(
        f"machine 0 at {venue.host_and_port} did not answer within {venue.timeout_text}; look what it says"
    )
