"""Nodes that connect, that differ, that do not come, and other clients at the port; nodes are threads."""

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError, Problem
from shoestring.comm.rank_consistency import Fingerprint, Fingerprints, describe_mismatch, fingerprints_to_json
from shoestring.launch.run import node_connection, rendezvous
from shoestring.launch.run.rendezvous import (
    RendezvousEndpoint,
    RendezvousError,
    host_rendezvous,
    join_rendezvous,
    master_address_problems,
    report_config_error,
)
from shoestring.tests.launch.small_run import free_port

FINGERPRINTS = {"training.seed": Fingerprint("1", "0"), "code": Fingerprint("2", "abc")}
NO_RENDEZVOUS = (
    *(b"SSH-2.0-OpenSSH\n", b"[" * 100_000 + b"\n", b'{"go": NaN}\n', b"7\n", b"{}\n"),
    *(b'{"run_dir": "a\\u0000b", "attempt": "x"}\n', b'{"run_dir": "a", "attempt": 7}\n', b'{"refused": [1]}\n'),
)
Outcome = Path | str | None


def endpoints(nodes: int, seconds: float = 20) -> list[RendezvousEndpoint]:
    port = free_port()
    return [RendezvousEndpoint("127.0.0.1", port, nodes, node, seconds) for node in range(nodes)]


def outcome(call: Callable[[], Outcome]) -> Outcome:
    try:
        return call()
    except (ConfigError, RendezvousError) as error:
        return f"{type(error).__name__}: {error}"


def run_rendezvous(run_dir: Path, own: list[Fingerprints]) -> list[Outcome]:
    """Return the outcome on each node."""
    places = endpoints(len(own))
    with ThreadPoolExecutor(len(own)) as nodes:
        pairs = zip(places[1:], own[1:], strict=True)
        joined = [nodes.submit(outcome, partial(join_rendezvous, *pair)) for pair in pairs]
        host: Future[Outcome] = nodes.submit(outcome, lambda: host_rendezvous(places[0], own[0], run_dir, "attempt"))
        return [host.result(60), *(joining.result(60) for joining in joined)]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rendezvous, node_connection):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(rendezvous, "_SECONDS_TO_SEE", 0.3)


@pytest.mark.parametrize("nodes", [2, 5])
def test_all_learn_the_run_directory_and_nothing_is_left(nodes: int, tmp_path: Path) -> None:
    assert run_rendezvous(tmp_path, [FINGERPRINTS] * nodes) == [None, *[tmp_path] * (nodes - 1)]
    assert list(tmp_path.iterdir()) == []


def test_a_node_that_differs_is_refused_on_all(tmp_path: Path) -> None:
    other = FINGERPRINTS | {"training.seed": Fingerprint("9", "7")}
    words = run_rendezvous(tmp_path, [FINGERPRINTS, FINGERPRINTS, other])
    for each in words:
        assert str(each).startswith("ConfigError")
        assert re.search(r"training\.seed = '0 on node 0 \(.*\), 7 on node 2 \(", str(each))


def _blind(note: Path, attempt: str) -> bool:
    return False


def test_a_directory_that_is_not_shared_is_refused_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_sees_file", _blind)
    for each in run_rendezvous(tmp_path, [FINGERPRINTS, FINGERPRINTS]):
        assert "training.run_dir" in str(each)
        assert "is not shared: node 1" in str(each)


def test_what_a_node_sees(tmp_path: Path) -> None:
    note = tmp_path / "rendezvous"
    assert not rendezvous._sees_file(note, "this")
    note.write_text("the one before")
    assert not rendezvous._sees_file(note, "this")
    threading.Timer(0.1, note.write_text, ["this"]).start()  # a network file system shows it late
    assert rendezvous._sees_file(note, "this")
    assert not rendezvous._sees_file(tmp_path / "none" / "rendezvous", "this")


def test_waiting_for_a_node_that_never_comes_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host, _, _ = endpoints(3, seconds=0.3)
    began = time.monotonic()
    with pytest.raises(
        RendezvousError, match=f"2 of 3 nodes did not connect to 127.0.0.1:{host.port} within 0.3 s .*1, 2"
    ):
        host_rendezvous(host, FINGERPRINTS, tmp_path, "attempt")
    assert time.monotonic() - began < 5
    assert f"waiting for 2 of 3 nodes at 127.0.0.1:{host.port} (missing: 1, 2)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_node_0_that_never_comes(capsys: pytest.CaptureFixture[str]) -> None:
    _, joining = endpoints(2, seconds=0.3)
    with pytest.raises(
        RendezvousError, match=f"node 0 did not listen at 127.0.0.1:{joining.port} within 0.3 s .*MASTER_ADDR"
    ):
        join_rendezvous(joining, FINGERPRINTS)
    assert f"waiting for node 0 at 127.0.0.1:{joining.port}" in capsys.readouterr().err


def test_a_node_that_was_refused_ends_the_waiting_of_one_that_listens_later(tmp_path: Path) -> None:
    host, joining = endpoints(2)
    with ThreadPoolExecutor(1) as node:
        reporting = node.submit(report_config_error, joining, ConfigError([Problem("model.hiden", 3, "no such key")]))
        words = outcome(lambda: host_rendezvous(host, FINGERPRINTS, tmp_path, "attempt"))
        reporting.result(20)
    assert "reported an error: model.hiden = 3: no such key" in str(words)


@pytest.mark.parametrize(
    "words",
    [
        b"",
        b"\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"[1]\n",
        b'{"node": 1}\n',
        b'{"node": 7, "host": "x", "fingerprints": "{}"}\n',
        b'{"node": "1", "host": "x", "fingerprints": "{}"}\n',
        json.dumps({"node": True, "host": "x", "fingerprints": fingerprints_to_json(FINGERPRINTS)}).encode() + b"\n",
        json.dumps({"node": 1, "host": 7, "fingerprints": fingerprints_to_json(FINGERPRINTS)}).encode() + b"\n",
        b"\xff\xfe\n",
        b'{"node": 1, "host": "x", "fingerprints": "[]"}\n',
        b"[" * 100_000 + b"\n",
    ],
)
def test_strangers_at_the_port_are_let_go(words: bytes, tmp_path: Path) -> None:
    host, joining = endpoints(2)
    with ThreadPoolExecutor(2) as nodes:
        hosting = nodes.submit(outcome, lambda: host_rendezvous(host, FINGERPRINTS, tmp_path, "attempt"))
        with _reached(host) as stranger:
            stranger.sendall(words)
        attending = nodes.submit(outcome, lambda: join_rendezvous(joining, FINGERPRINTS))
        assert (hosting.result(30), attending.result(30)) == (None, tmp_path)


def _reached(endpoint: RendezvousEndpoint) -> socket.socket:
    while True:
        try:
            return socket.create_connection((endpoint.address, endpoint.port), 5)
        except ConnectionRefusedError:
            time.sleep(0.01)


def test_silent_connections_delay_no_node_and_no_limit(tmp_path: Path) -> None:
    host, joining = endpoints(2)
    began = time.monotonic()
    with ThreadPoolExecutor(2) as nodes:
        hosting = nodes.submit(outcome, lambda: host_rendezvous(host, FINGERPRINTS, tmp_path, "attempt"))
        with _reached(host), _reached(host), _reached(host) as half:
            half.sendall(b'{"node": ')
            attending = nodes.submit(outcome, lambda: join_rendezvous(joining, FINGERPRINTS))
            assert (hosting.result(60), attending.result(60)) == (None, tmp_path)
        impatient, _ = endpoints(2, seconds=0.5)
        hosting = nodes.submit(outcome, lambda: host_rendezvous(impatient, FINGERPRINTS, tmp_path, "attempt"))
        with _reached(impatient), _reached(impatient):
            assert "did not connect" in str(hosting.result(60))
    assert time.monotonic() - began < node_connection.SECONDS_TO_SPEAK


def test_a_silent_connection_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_connection, "SECONDS_TO_SPEAK", 0.1)
    monkeypatch.setattr(node_connection, "_MAX_UNIDENTIFIED", 1)
    host, _ = endpoints(2, seconds=2)
    with ThreadPoolExecutor(1) as nodes:
        hosting = nodes.submit(outcome, lambda: host_rendezvous(host, FINGERPRINTS, tmp_path, "attempt"))
        with _reached(host) as first, _reached(host) as second:
            assert (first.recv(1), second.recv(1)) == (b"", b"")
            assert not hosting.done()
        assert "did not connect" in str(hosting.result(60))


def test_a_fifo_in_the_place_of_the_note_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rendezvous")
    seen: list[bool] = []
    note = tmp_path / "rendezvous"
    looking = threading.Thread(target=lambda: seen.append(rendezvous._sees_file(note, "this")), daemon=True)
    looking.start()
    looking.join(20)
    assert seen == [False]


def test_a_node_that_comes_again_takes_its_own_place(tmp_path: Path) -> None:
    host, first, second = endpoints(3)
    with ThreadPoolExecutor(4) as nodes:
        hosting = nodes.submit(outcome, lambda: host_rendezvous(host, FINGERPRINTS, tmp_path, "attempt"))
        with _reached(host) as gone:
            node_connection.NodeConnection(gone).send(
                {"node": 1, "host": "x", "fingerprints": fingerprints_to_json(FINGERPRINTS)}
            )
            gone.shutdown(socket.SHUT_WR)
            others = [nodes.submit(outcome, partial(join_rendezvous, first, FINGERPRINTS))]
            gone.settimeout(30)
            assert gone.recv(1) == b""  # its place is taken: a third node before that would end the wait
        others.append(nodes.submit(outcome, partial(join_rendezvous, second, FINGERPRINTS)))
        assert [hosting.result(30), *(other.result(30) for other in others)] == [None, tmp_path, tmp_path]


def test_a_node_that_leaves_is_named(tmp_path: Path) -> None:
    host, _ = endpoints(2)
    with ThreadPoolExecutor(1) as nodes:
        hosting = nodes.submit(outcome, lambda: host_rendezvous(host, FINGERPRINTS, tmp_path, "attempt"))
        with _reached(host) as gone:
            line = node_connection.NodeConnection(gone)
            line.send({"node": 1, "host": "far", "fingerprints": fingerprints_to_json(FINGERPRINTS)})
            line.receive(10)
        assert "node 1 (far) disconnected" in str(hosting.result(30))


def test_a_node_that_leaves_before_it_is_answered_is_named() -> None:
    here, there = socket.socketpair()
    joining = node_connection.NodeConnection(here)
    joining.name = "node 1 (far)"
    there.close()
    with pytest.raises(RendezvousError, match=r"node 1 \(far\) disconnected"):
        rendezvous._send(joining, {"go": True})
    here.close()


def test_a_note_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rendezvous").mkdir()
    host, _ = endpoints(2)
    with pytest.raises(ConfigError, match=r"free disk space, or use another training\.run_dir"):
        host_rendezvous(host, FINGERPRINTS, tmp_path, "attempt")


def test_a_port_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_connection, "_SECONDS_FOR_PORT", 0.1)
    host, _ = endpoints(2)
    with (
        socket.create_server((host.address, host.port)),
        pytest.raises(ConfigError, match=f"MASTER_PORT = {host.port}"),
    ):
        host_rendezvous(host, FINGERPRINTS, tmp_path, "attempt")


@pytest.mark.parametrize(
    "words", [b"SSH-2.0-OpenSSH\n", b"[" * 100_000 + b"\n", b'{"go": NaN}\n', b"7\n", *NO_RENDEZVOUS]
)
def test_what_answers_and_is_no_launch(words: bytes) -> None:
    _, joining = endpoints(2)
    with socket.create_server((joining.address, joining.port)) as other, ThreadPoolExecutor(1) as nodes:
        attending = nodes.submit(outcome, lambda: join_rendezvous(joining, FINGERPRINTS))
        connection, _ = other.accept()
        with connection:
            connection.sendall(words)
            assert "is not node 0 of a Shoestring launch" in str(attending.result(30))


def test_names_that_do_not_resolve() -> None:
    assert [problem.field for problem in master_address_problems("no-such-machine.invalid")] == ["MASTER_ADDR"]
    assert [problem.field for problem in master_address_problems("a" * 300)] == ["MASTER_ADDR"]
    for address in ("127.0.0.1", "::1", "localhost"):
        assert list(master_address_problems(address)) == []


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        ("node0:29500", "write MASTER_ADDR=node0 and MASTER_PORT=29500"),
        ("[::1]", "write ::1, without spaces and brackets"),
        (" 127.0.0.1", "write 127.0.0.1, without spaces and brackets"),
        ("  ", "write an address of node 0"),
        ("tcp://127.0.0.1", "write an address of node 0"),
        ("0.0.0.0", "is the wildcard address"),
        ("::", "is the wildcard address"),
    ],
)
def test_an_address_that_is_written_wrong_gets_a_hint(address: str, hint: str) -> None:
    (problem,) = master_address_problems(address)
    assert problem.value == address
    assert hint in problem.hint


def test_hidden_values_that_differ_are_named() -> None:
    words = describe_mismatch(
        "prompt", ("here", {"prompt": Fingerprint("1", "${x}")}), ("there", {"prompt": Fingerprint("2", "${x}")})
    )
    assert words == "${x} on here, ${x} on there (environment variables differ)"
    assert (
        describe_mismatch("a", ("here", {"a": Fingerprint("1", "x")}), ("there", {})) == "x on here, nothing on there"
    )


def test_an_address_of_another_machine_is_hinted_at() -> None:
    assert rendezvous._not_local_hint("127.0.0.1") == ""
    assert "is not an address of this machine" in rendezvous._not_local_hint("192.0.2.1")  # RFC 5737
