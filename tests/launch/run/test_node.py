"""launch/torchrun.sh: its variables and refusals."""

import subprocess

import pytest
import torch

from shoestring.comm.bootstrap import TorchrunEnvironment
from shoestring.comm.errors import ConfigError
from shoestring.launch.compose import compose_run_config
from shoestring.launch.run.node import NodeEnvironment, count_local_ranks, read_node_environment
from shoestring.launch.run.on_ranks import pick_device
from shoestring.launch.run.worker import print_unused_gpus
from shoestring.tests.launch.refusals import refused
from shoestring.tests.launch.two_machines import SCRIPT, environment

TWO = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"}


def test_the_variables_become_torchruns_arguments() -> None:
    assert read_node_environment({}).torchrun_arguments(4) == [
        "--rdzv-backend=loopback",
        "--rdzv-endpoint=127.0.0.1",
        "--nproc-per-node=4",
    ]
    place = read_node_environment(TWO | {"MASTER_PORT": "1234", "GPUS_PER_NODE": "8"})
    assert place == NodeEnvironment("node0", 1234, node_count=2, node_rank=1, gpus_per_node=8)
    assert place.torchrun_arguments(8) == [
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
    with pytest.raises(ConfigError) as refused:
        read_node_environment(variables)
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
    config = compose_run_config(["training.device=cpu", *topology])
    place = read_node_environment(TWO | ({} if processes is None else {"GPUS_PER_NODE": processes}))
    if not fields:
        assert count_local_ranks(config, place) == 2
        return
    with pytest.raises(ConfigError) as refused:
        count_local_ranks(config, place)
    assert [problem.field for problem in refused.value.problems] == fields


@pytest.mark.parametrize(
    ("gpus", "variables", "hint"),
    [
        (1, {}, "write topology=single, or GPUS_PER_NODE=4 and training.device=cpu"),
        (8, {}, "write a topology of 8 ranks (pp x edp x ep), or GPUS_PER_NODE=4"),
        (0, {"GPUS_PER_NODE": "2"}, "write a topology of 2 ranks (pp x edp x ep), or GPUS_PER_NODE=4"),
        (8, {**TWO, "NNODES": "3"}, "write a topology of 24 ranks (pp x edp x ep)"),
    ],
)
def test_a_machine_of_another_size_gets_a_hint(
    gpus: int, variables: dict[str, str], hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    found = refused(count_local_ranks, compose_run_config(["experiment=quickstart"]), read_node_environment(variables))
    assert found["GPUS_PER_NODE"].endswith(f"; {hint}")


@pytest.mark.parametrize(("gpus", "line"), [(0, None), (1, "write topology=single\n"), (3, "of 3 ranks\n"), (4, None)])
def test_gpus_that_are_too_few_are_not_passed_over_in_silence(
    gpus: int, line: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for rank in range(4):
        place = TorchrunEnvironment(rank, rank, 4, local_world_size=4)
        print_unused_gpus("auto", place)
        assert pick_device("auto", place).type == ("cuda" if gpus == 4 else "cpu")
    said = capsys.readouterr().err
    assert said.count("\n") == (line is not None)
    assert said.endswith(line or "")


def test_the_script_explains_itself_and_exits_with_2() -> None:
    explained = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, timeout=60, check=True)
    assert explained.stdout.startswith("Train on one node or on several")
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
