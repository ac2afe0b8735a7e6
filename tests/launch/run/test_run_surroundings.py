"""Launches in odd surroundings: no output, modules in the working directory, a machine without `localhost`."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters

from shoestring.comm import loopback
from shoestring.comm.bootstrap import WorkerEnvironment
from shoestring.comm.errors import ConfigError
from shoestring.comm.loopback import listen_on, loopback_address, loopback_of
from shoestring.launch.compose import compose_run
from shoestring.launch.run import restart_policy as stops
from shoestring.launch.run import train, worker
from shoestring.launch.run.launcher import _wait
from shoestring.launch.run.restart_policy import MOST_STOPS, end_of, note_stop, stops_without_step, too_many_stops
from shoestring.launch.run.run_dir import claimed, read_status, wait_until_free
from shoestring.launch.run.signals import LAUNCHER_VARIABLE
from shoestring.launch.run.torchrun_agent import LoopbackRendezvous, describe
from shoestring.launch.say import say
from shoestring.tests.launch.real_run import processes_of, wait_for_step, wait_until
from shoestring.tests.launch.small_run import free_port, small_run
from shoestring.trainer.ledger.summary import summarize
from shoestring.trainer.run.evaluate import evaluated_until

SECRET = "correct horse battery staple"
MODULES = ("token", "random", "queue", "wandb", "torch", "trainer", "launch", "yaml", "sitecustomize")


def listening_addresses(pids: list[int]) -> set[str]:
    """Where these processes wait for TCP connections, as the kernel writes addresses."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            if (target := str(descriptor.readlink())).startswith("socket:["):
                inodes.add(target[8:-1])
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_launch_without_output_among_strange_modules_leaves_no_trace_but_its_run(tmp_path: Path) -> None:
    """Also: no secret in a file, no listener beyond loopback, one directory for `${now:}`, SIGHUP asks."""
    here, scratch, runs = tmp_path / "here", tmp_path / "scratch", tmp_path / "runs"
    for folder in (here, scratch, runs):
        folder.mkdir()
    for name in MODULES:
        (here / f"{name}.py").write_text("raise SystemExit('a module of the working directory')")
    overrides = [*small_run(tmp_path / "data", 1), "training.tokens=1e9", "telemetry.log_every=1"]
    overrides += [f"training.run_dir={runs}/${{now:%H%M%S.%f}}", "training.sample_prompt=${oc.env:PROMPT}"]
    overrides += ["telemetry.wandb.mode=offline", "data.corpus=/${oc.env:PROMPT}"]
    command = [sys.executable, "-P", "-m", "shoestring.launch.cli", "train", *overrides]
    environment = os.environ | {"TMPDIR": str(scratch), "PROMPT": SECRET}
    closed = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", *command]
    with subprocess.Popen(closed, env=environment, cwd=here, text=True) as process:
        try:
            wait_until(lambda: bool(list(runs.iterdir())) or process.poll() is not None, 60)
            (run_dir,) = runs.iterdir()
            wait_for_step(run_dir, process, 2)
            pids = [process.pid, *processes_of(run_dir)]
            assert len(pids) >= 4
            assert listening_addresses(pids) <= {"0100007F", "00000000000000000000000001000000"}
            process.send_signal(signal.SIGHUP)
            assert process.wait(60) == 75
        finally:
            process.kill()
    assert [path.name for path in runs.iterdir()] == [run_dir.name]
    assert list(scratch.iterdir()) == []
    assert not summarize(run_dir).running
    holders = [path for path in run_dir.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert holders == []


def in_torchrun(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in ("LOCAL_RANK", "SHOESTRING_LAUNCHER_PID", "SHOESTRING_ATTEMPT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())} | variables).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("RANK", value) for value in ("abc", "", "-1", "2", "1e0", "\u0661")),
        *(("WORLD_SIZE", value) for value in ("0", "two")),
        ("LOCAL_RANK", "x"),
        *(("LOCAL_WORLD_SIZE", value) for value in ("x", "0", "")),
        *(("MASTER_PORT", value) for value in ("0", "http", "99999999999999999999")),
        ("MASTER_ADDR", ""),
    ],
)
def test_variables_of_ranks_that_mean_nothing_are_refused(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_torchrun(monkeypatch, **({"RANK": "0", "WORLD_SIZE": "2"} | {name: value}))
    with pytest.raises(ConfigError) as refused:
        WorkerEnvironment.read()
    assert [problem.field for problem in refused.value.problems] == [name]


@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_without_the_launcher_exits_with_the_true_code_and_says_why(
    rank: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker, "listen_for_stop", lambda seconds: lambda: False)
    in_torchrun(monkeypatch, RANK=str(rank), WORLD_SIZE="8", LOCAL_RANK=str(rank))
    run = ["topology=single", "schedule=one_f_one_b", "training.device=cpu", f"training.run_dir={tmp_path / 'run'}"]
    assert train.train_command(run, None, fresh=False) == 2
    assert "world size = 8: topology asks for 1 processes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("world_size", "words"), [("1", "another run is going on"), ("8", "topology asks for 1 proc")])
def test_a_second_launch_without_the_launcher_leaves_a_live_run_alone(
    world_size: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker, "listen_for_stop", lambda seconds: lambda: False)
    in_torchrun(monkeypatch, RANK="0", WORLD_SIZE=world_size)
    run_dir = tmp_path / "run"
    run = ["topology=single", "schedule=one_f_one_b", "training.device=cpu", f"training.run_dir={run_dir}"]
    with claimed(run_dir, fresh=False):
        for name in ("config.yaml", "run_status.json", "ended"):
            (run_dir / name).write_text("the live run's")
        before = {path: path.read_bytes() for path in run_dir.iterdir()}
        try:
            assert train.train_command(run, None, fresh=False) == 2
            told = capsys.readouterr().err
        except ConfigError as refused:
            told = str(refused)
        assert words in told
        assert {path: path.read_bytes() for path in run_dir.iterdir()} == before


def test_the_launcher_is_refused_beside_a_run_without_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(LAUNCHER_VARIABLE, raising=False)
    config = compose_run(["topology=single", "schedule=one_f_one_b", f"training.run_dir={tmp_path / 'run'}"])
    with (
        worker._owning(config),
        pytest.raises(ConfigError, match="another run is going on"),
        claimed(tmp_path / "run", fresh=True),
    ):
        pass


def test_a_refusal_in_a_container_is_no_success(tmp_path: Path) -> None:
    overrides = [*small_run(tmp_path, 1), "topology.ep=1", "schedule=one_f_one_b", "training.sequence_length=100000"]
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    command = [
        sys.executable,
        "-m",
        "shoestring.launch.cli",
        "train",
        *overrides,
        f"training.run_dir={tmp_path / 'run'}",
    ]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "the train split has" in done.stderr
    status = read_status(tmp_path / "run")
    assert status is not None
    assert status["exit_code"] == 2


def test_this_machine_is_reached_by_an_address_and_not_by_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_names(*arguments: object, **options: object) -> Iterator[object]:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_names)
    assert loopback_address() == "127.0.0.1"
    assert loopback_of("localhost") is None


def test_a_machine_that_cannot_reach_itself_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loopback, "_ADDRESSES", ("192.0.2.1", "2001:db8::1"))  # of no machine
    with pytest.raises(ConfigError, match=r"localhost = .*cannot reach itself .*192.0.2.1: .*ip link set lo up"):
        loopback_address()


def bare_machine(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `script` where there is no network but a loopback that is down; skip where this process may not."""
    for flags in (["--net", "--mount"], ["--user", "--map-root-user", "--net", "--mount"]):
        if subprocess.run(["unshare", *flags, "true"], capture_output=True, check=False).returncode == 0:
            command = ["unshare", *flags, "bash", "-ec", script]
            return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    pytest.skip("no namespaces may be made here")


@pytest.mark.skipif(shutil.which("unshare") is None, reason="makes network namespaces by `unshare`")
@pytest.mark.parametrize("has_loopback", [False, True])
def test_a_machine_without_a_network_or_without_localhost(has_loopback: bool, tmp_path: Path) -> None:
    """It needs no name: it runs where /etc/hosts is empty; where loopback is down, one sentence says what to do."""
    overrides = [*small_run(tmp_path, 1), "telemetry.wandb.mode=offline", f"training.run_dir={tmp_path / 'run'}"]
    train = shlex.join([sys.executable, "-m", "shoestring.launch.cli", "train", *overrides])
    prepare = ": > hosts; mount --bind hosts /etc/hosts; ip link set lo up; " if has_loopback else ""
    began = time.monotonic()
    done = bare_machine(prepare + train, tmp_path)
    if has_loopback:
        assert done.returncode == 0, done.stderr
        assert read_status(tmp_path / "run") == {"exit_code": 0, "reason": "1 steps done"}
        return
    assert time.monotonic() - began < 30
    refused, problem = done.stderr.splitlines()
    assert (done.returncode, refused) == (2, "shoestring train: refused")
    assert problem.startswith("  localhost = '127.0.0.1': this machine cannot reach itself")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("host", "address"), [("127.0.0.1", "127.0.0.1"), ("192.0.2.1", None), ("0.0.0.0", None)])
def test_which_hosts_are_loopback(host: str, address: str | None) -> None:
    assert loopback_of(host) == address


def test_ranks_of_one_machine_meet_at_its_loopback_address_alone() -> None:
    meeting = LoopbackRendezvous(RendezvousParameters("loopback", "127.0.0.1", "run", 1, 1))
    info = meeting.next_rendezvous()
    assert (info.rank, info.world_size, meeting.use_agent_store) == (0, 1, True)
    store = info.bootstrap_store_info
    assert store is not None
    port = f"{store.master_port:04X}"
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    assert {row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{port}")} == {f"0100007F:{port}"}


def test_a_port_is_listened_to_once() -> None:
    with listen_on("127.0.0.1") as first, pytest.raises(OSError, match="in use"):
        listen_on("127.0.0.1", first.getsockname()[1])


def test_failed_ranks_in_a_line() -> None:
    def failure(rank: int, code: int) -> ProcessFailure:
        made = ProcessFailure(local_rank=rank, pid=10 + rank, exitcode=code, error_file="<N/A>")
        made.timestamp = rank
        return made

    killed = ChildFailedError("rank", {0: failure(0, -9), 3: failure(3, 1)})
    assert describe(killed) == "rank 0 was ended by SIGKILL, and after it 1 more of this machine"
    assert describe(ChildFailedError("rank", {1: failure(1, 7)})) == "rank 1 exited with 7"


def test_torchrun_is_ended_when_its_ranks_have_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoestring.launch.run.launcher._SECONDS_ALONE", 0.2)
    monkeypatch.setattr("shoestring.launch.run.launcher._SECONDS_BETWEEN_LOOKS", 0.05)
    waits = "import subprocess, time; subprocess.run(['sleep', '0.5']); time.sleep(600)"  # as in an exit barrier
    with subprocess.Popen([sys.executable, "-c", waits]) as agent:
        assert _wait(agent) == 0
        assert agent.poll() is not None
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as agent:
        assert _wait(agent) == 3


def test_stops_without_a_step_are_counted_until_one_is_made(tmp_path: Path) -> None:
    assert too_many_stops(tmp_path) is None
    for count in range(1, MOST_STOPS):
        note_stop(tmp_path, progressed=False)
        assert (stops_without_step(tmp_path), too_many_stops(tmp_path)) == (count, None)
    note_stop(tmp_path, progressed=False)
    assert "3 launches in a row were stopped before their first step" in str(too_many_stops(tmp_path))
    note_stop(tmp_path, progressed=True)
    assert too_many_stops(tmp_path) is None
    for junk in ("", "x", "-1", "9" * 50, "\0"):
        (tmp_path / stops._FILE).write_text(junk)
        assert stops_without_step(tmp_path) == 0


def test_notes_of_a_run_that_are_no_files_say_nothing(tmp_path: Path) -> None:
    names: dict[str, Callable[[Path], int | None]] = {stops._FILE: stops_without_step, "evaluated": evaluated_until}
    names[stops._ENDED] = lambda run: end_of(run, "a")
    harms: list[Callable[[Path], object]] = [os.mkfifo, Path.mkdir, lambda path: path.write_bytes(b"\xff"), endless]
    for harm in harms:
        for name, read in names.items():
            harm(tmp_path / name)
            assert not read(tmp_path), name
            (tmp_path / name).rmdir() if (tmp_path / name).is_dir() else (tmp_path / name).unlink()


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def test_a_directory_that_is_let_go_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wait_until_free(tmp_path / "none", 60)
    with claimed(tmp_path / "run", fresh=False):
        wait_until_free(tmp_path / "run", 0.1)
    assert "waiting up to 0.1 s for the launch before this one" in capsys.readouterr().err
    wait_until_free(tmp_path / "run", 60)
    assert capsys.readouterr().err == ""


def test_words_that_nobody_can_read_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        say("something")
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space"):
            full.close()
