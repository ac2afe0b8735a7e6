"""Ranks of another launcher wait for each other with a message, a time limit, and attention to signals."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from shoestring.comm.bootstrap import TorchrunEnvironment
from shoestring.comm.errors import ConfigError
from shoestring.launch.run.rendezvous import open_rendezvous_store
from shoestring.launch.run.run_dir import count_stops_without_step, read_run_status
from shoestring.launch.run.signals import StoppedBeforeStart
from shoestring.tests.launch.small_run import free_port, small_run
from shoestring.trainer.run.exit import HaltReason

PAIR = [
    TorchrunEnvironment(rank=0, local_rank=0, world_size=2),
    TorchrunEnvironment(rank=1, local_rank=1, world_size=2),
]


def at(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))


def test_an_address_that_does_not_resolve_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_names(*arguments: object, **options: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    at(monkeypatch, "machine-0.invalid")
    monkeypatch.setattr(socket, "getaddrinfo", no_names)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR = 'machine-0.invalid': does not resolve on this machine"):
        open_rendezvous_store(PAIR[1], 5, lambda: False)


@pytest.mark.parametrize("worker", PAIR)
def test_a_rank_that_waits_alone_says_so_and_ends_at_its_limit(
    worker: TorchrunEnvironment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at(monkeypatch, "127.0.0.1")
    began = time.monotonic()
    with pytest.raises((dist.DistError, OSError)):
        open_rendezvous_store(worker, 1, lambda: False)
    assert time.monotonic() - began < 10
    words = f"rank 0 waits for 1 other rank at 127.0.0.1:{os.environ['MASTER_PORT']}"
    assert (words in capsys.readouterr().err) == (worker.local_rank == 0)


@pytest.mark.parametrize("worker", PAIR)
def test_a_request_to_stop_ends_the_wait(worker: TorchrunEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, "127.0.0.1")
    asked_at = time.monotonic() + 0.3
    with pytest.raises(StoppedBeforeStart, match=r"all 2 ranks had connected at 127\.0\.0\.1:"):
        open_rendezvous_store(worker, 3, lambda: time.monotonic() > asked_at)
    assert time.monotonic() < asked_at + 1.5


@pytest.mark.parametrize("rank", [0, 1])
def test_a_container_whose_peers_do_not_come_ends_at_sigterm(rank: int, tmp_path: Path) -> None:
    overrides = [*small_run(tmp_path, 2), f"training.run_dir={tmp_path / 'run'}"]
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    command = [sys.executable, "-P", "-m", "shoestring.launch.cli", "train", *overrides]
    with subprocess.Popen(command, env=os.environ | variables, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert f"rank {rank} waits for 1 other rank" in process.stderr.readline()
            process.send_signal(signal.SIGTERM)
            asked_at = time.monotonic()
            assert process.wait(30) == HaltReason.PREEMPTED
            assert time.monotonic() < asked_at + 2
            assert "stopped before all 2 ranks had connected" in process.stderr.read()
            if rank == 0:
                status = read_run_status(tmp_path / "run")
                assert status is not None
                assert status["exit_code"] == HaltReason.PREEMPTED
                assert count_stops_without_step(tmp_path / "run") == 1
        finally:
            process.kill()
