"""launch/torchrun.sh: what it refuses, and two machines that are two launchers of this one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from shoestring.comm.bootstrap import WorkerEnvironment
from shoestring.comm.refusal import Refused
from shoestring.launch.compose import compose_run
from shoestring.launch.node import Place, count_processes, read_place
from shoestring.launch.run_dir import read_status
from shoestring.launch.worker import pick_device
from shoestring.tests.launch.refusals import refused
from shoestring.tests.launch.small_run import free_port, small_run
from shoestring.tests.tree import ROOT
from shoestring.trainer.budget.summary import summarise
from shoestring.trainer.telemetry.history import read_metrics

SCRIPT = ROOT / "launch" / "torchrun.sh"
TWO = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"}


def environment(**variables: str) -> dict[str, str]:
    own = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "GPUS_PER_NODE")
    return {key: value for key, value in os.environ.items() if key not in own} | {"PYTHON": sys.executable} | variables


def test_the_variables_become_torchruns_arguments() -> None:
    assert read_place({}).torchrun(4) == ["--rdzv-backend=loopback", "--rdzv-endpoint=127.0.0.1", "--nproc-per-node=4"]
    place = read_place(TWO | {"MASTER_PORT": "1234", "GPUS_PER_NODE": "8"})
    assert place == Place(nodes=2, rank=1, address="node0", port=1234, processes=8)
    assert place.torchrun(8) == [
        "--nnodes=2",
        "--node-rank=1",
        "--master-addr=node0",
        "--master-port=1234",
        "--nproc-per-node=8",
    ]


@pytest.mark.parametrize(
    ("variables", "fields"),
    [
        ({"NNODES": "two", "MASTER_PORT": "0", "GPUS_PER_NODE": "-1"}, ["NNODES", "MASTER_PORT", "GPUS_PER_NODE"]),
        ({"NNODES": "2"}, ["NODE_RANK", "MASTER_ADDR"]),
        (TWO | {"NODE_RANK": "2"}, ["NODE_RANK"]),
        ({"NODE_RANK": "1"}, ["NODE_RANK"]),
    ],
)
def test_variables_that_are_refused(variables: dict[str, str], fields: list[str]) -> None:
    with pytest.raises(Refused) as refused:
        read_place(variables)
    assert [problem.field for problem in refused.value.problems] == fields


@pytest.mark.parametrize(
    ("topology", "processes", "fields"),
    [
        (["topology.ep=4", "topology.gpus_per_node=2"], None, []),
        (["topology.ep=4", "topology.gpus_per_node=2"], "2", []),
        (["topology.ep=4"], None, ["topology.gpus_per_node"]),
        (["topology.ep=4"], "4", ["GPUS_PER_NODE", "topology.gpus_per_node"]),
    ],
)
def test_machines_must_be_the_topologys(topology: list[str], processes: str | None, fields: list[str]) -> None:
    config = compose_run(["training.device=cpu", *topology])
    place = read_place(TWO | ({} if processes is None else {"GPUS_PER_NODE": processes}))
    if not fields:
        assert count_processes(config, place) == 2
        return
    with pytest.raises(Refused) as refused:
        count_processes(config, place)
    assert [problem.field for problem in refused.value.problems] == fields


@pytest.mark.parametrize(
    ("gpus", "variables", "remedy"),
    [
        (1, {}, "write topology=single, or GPUS_PER_NODE=4 and training.device=cpu"),
        (8, {}, "write a topology of 8 ranks (pp x edp x ep), or GPUS_PER_NODE=4"),
        (0, {"GPUS_PER_NODE": "2"}, "write a topology of 2 ranks (pp x edp x ep), or GPUS_PER_NODE=4"),
        (8, {**TWO, "NNODES": "3"}, "write a topology of 24 ranks (pp x edp x ep)"),
    ],
)
def test_a_machine_of_another_size_is_told_what_to_write(
    gpus: int, variables: dict[str, str], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    found = refused(count_processes, compose_run(["experiment=quickstart"]), read_place(variables))
    assert found["GPUS_PER_NODE"].endswith(f"; {remedy}")


@pytest.mark.parametrize(("gpus", "line"), [(0, None), (1, "write topology=single\n"), (3, "of 3 ranks\n"), (4, None)])
def test_gpus_that_are_too_few_are_not_passed_over_in_silence(
    gpus: int, line: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    config = compose_run(["experiment=quickstart"])
    devices = [pick_device(config, WorkerEnvironment(rank, rank, 4)).type for rank in range(4)]
    assert devices == ["cuda" if gpus == 4 else "cpu"] * 4
    said = capsys.readouterr().err
    assert said.count("\n") == (line is not None)
    assert said.endswith(line or "")


def test_the_script_explains_itself_and_exits_with_2() -> None:
    explained = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, timeout=60, check=True)
    assert explained.stdout.startswith("Train on one machine or on several")
    assert "GPUS_PER_NODE" in explained.stdout
    refused = subprocess.run(
        [SCRIPT], capture_output=True, text=True, timeout=60, check=False, env=environment(NNODES="2")
    )
    assert refused.returncode == 2
    assert "NODE_RANK = '': is missing" in refused.stderr
    nowhere = subprocess.run(
        [SCRIPT], capture_output=True, text=True, timeout=60, check=False, env=environment(PYTHON="/bin/false")
    )
    assert nowhere.returncode == 2
    assert "has no shoestring" in nowhere.stderr


def start(rank: int, overrides: list[str], meeting: dict[str, str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [SCRIPT, *overrides],
        env=environment(NODE_RANK=str(rank), **meeting),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_machines_are_one_run(tmp_path: Path) -> None:
    """Machine 0 resolves `${now:}` for both, and no machine says that it failed."""
    runs, steps = tmp_path / "runs", 6
    overrides = [*small_run(tmp_path, steps), "topology.gpus_per_node=1", f"training.run_dir={runs}/${{now:%S.%f}}"]
    meeting = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    launchers = [start(rank, overrides, meeting, tmp_path) for rank in (1, 0)]
    try:
        texts = [launcher.communicate(timeout=120)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert [launcher.returncode for launcher in launchers] == [0, 0], "\n".join(texts)
    (run_dir,) = runs.iterdir()
    assert read_status(run_dir) == {"exit_code": 0, "reason": f"{steps} steps done"}
    assert [event.step for event in read_metrics(run_dir / "metrics.jsonl") if event.kind == "stop"] == [steps]
    assert not summarise(run_dir).running


def test_machines_that_differ_and_a_directory_of_one_machine_are_refused_by_both(tmp_path: Path) -> None:
    overrides = [*small_run(tmp_path, 1), "topology.gpus_per_node=1", "training.run_dir=run"]
    for own, folders, words in (
        (["training.seed=7"], ["here", "here"], "training.seed = '0 on machine 0"),
        ([], ["here", "there"], "training.run_dir = 'run': is not shared: machine 1"),
    ):
        meeting = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        places = [tmp_path / name for name in folders]
        for place in places:
            place.mkdir(exist_ok=True)
        both = [start(0, overrides, meeting, places[0]), start(1, [*overrides, *own], meeting, places[1])]
        texts = [machine.communicate(timeout=120)[0] for machine in both]
        assert [machine.returncode for machine in both] == [2, 2], "\n".join(texts)
        assert all(words in text for text in texts)


def test_a_machine_that_waits_for_others_stops_at_once(tmp_path: Path) -> None:
    overrides = [*small_run(tmp_path, 1), "topology.gpus_per_node=1", f"training.run_dir={tmp_path / 'run'}"]
    meeting = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with start(0, overrides, meeting, tmp_path) as machine:
        assert machine.stdout is not None
        assert "waiting for 1 of 2 machines at 127.0.0.1:" in machine.stdout.readline()
        asked = time.monotonic()
        machine.terminate()
        assert machine.wait(60) == 75
        assert time.monotonic() - asked < 2
        assert "stopped by SIGTERM before the machines had met" in machine.stdout.read()
    assert not summarise(tmp_path / "run").running
