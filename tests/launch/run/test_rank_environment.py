"""The environment of ranks: defaults where the user set nothing, and values from the launcher."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoestring.comm.bootstrap import TorchrunEnvironment
from shoestring.launch.compose import compose_run_config
from shoestring.launch.run import launcher, rank_environment, worker
from shoestring.launch.run.launcher import LocalRanks
from shoestring.launch.run.on_ranks import pick_device
from shoestring.launch.run.rank_environment import (
    COMMON_ENVIRONMENT,
    NUMA_BINDING_FLAG,
    NumaSupport,
    applicable_settings,
    apply_late_settings,
    describe_user_overrides,
    environment_settings,
    numa_binding_blocker,
    parse_cpu_list,
    supports_implicit_launch_order,
    uses_gpus,
)
from shoestring.trainer.config import RunConfig

ON_GPU = [setting for setting in environment_settings(Path("run")) if setting.name not in COMMON_ENVIRONMENT]
TWO_NODES = NumaSupport(
    (frozenset({0, 1}), frozenset({2, 3})), frozenset(range(4)), has_numactl=True, torchrun_has_flag=True
)


@pytest.fixture(autouse=True)
def _nothing_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in environment_settings(Path()):
        for name in (setting.name, *setting.aliases):
            monkeypatch.delenv(name, raising=False)


def configured(device: str) -> RunConfig:
    config = compose_run_config([])
    return replace(config, training=replace(config.training, device=device, run_dir="run"))


def test_the_user_wins_over_defaults_and_the_launcher_over_both(monkeypatch: pytest.MonkeyPatch) -> None:
    assert COMMON_ENVIRONMENT.items() <= rank_environment.build_rank_environment().items()
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("SHOESTRING_ATTEMPT", "outer")
    made = rank_environment.build_rank_environment({"SHOESTRING_ATTEMPT": "inner"})
    assert made["OMP_NUM_THREADS"] == "7"
    assert made["SHOESTRING_ATTEMPT"] == "inner"
    assert made["MALLOC_TRIM_THRESHOLD_"] == COMMON_ENVIRONMENT["MALLOC_TRIM_THRESHOLD_"]


def test_gpus_have_settings_that_cpus_go_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_environment, "_versions", lambda: ("13.0", 13000))
    cpu = {setting.name: setting.value for setting in applicable_settings(Path("run"), on_gpu=False)}
    gpu = {setting.name: setting.value for setting in applicable_settings(Path("run"), on_gpu=True)}
    assert cpu == COMMON_ENVIRONMENT
    assert cpu.items() < gpu.items()
    expected = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    expected |= {"NCCL_DEBUG": "WARN", "NCCL_LAUNCH_ORDER_IMPLICIT": "1", "TORCH_GLOO_LAZY_INIT": "1"}
    expected |= {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    assert expected.items() <= gpu.items()
    assert gpu["TORCH_FR_DUMP_TEMP_FILE"] == str(Path.cwd() / "run" / "flight_recorder" / "rank_")
    monkeypatch.setattr(rank_environment, "_versions", lambda: ("13.0", 12020))
    assert "NCCL_LAUNCH_ORDER_IMPLICIT" not in {
        setting.name for setting in applicable_settings(Path("run"), on_gpu=True)
    }


@pytest.mark.parametrize(
    ("runtime", "driver", "orders"),
    [(None, None, False), ("13.0", 13000, True), ("12.6", 12020, False), ("12.1", 13000, False), ("12.3", 12030, True)],
)
def test_launches_are_ordered_where_that_does_not_mean_one_by_one(
    runtime: str | None, driver: int | None, orders: bool
) -> None:
    assert supports_implicit_launch_order(runtime, driver) is orders


def test_another_name_of_a_setting_is_the_users_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {"PYTORCH_CUDA_ALLOC_CONF": "backend:native", "TORCH_FR_DUMP_TEMP_FILE": "/dumps/rank_"}
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    made = rank_environment.build_rank_environment({}, ON_GPU)
    assert not made.keys() & {"PYTORCH_ALLOC_CONF", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"}
    assert made["NCCL_DEBUG"] == "WARN"


def test_what_the_user_has_set_is_named_once() -> None:
    theirs = {"NCCL_DEBUG": "INFO", "PYTORCH_CUDA_ALLOC_CONF": "backend:native", "TORCH_GLOO_LAZY_INIT": "1"}
    assert list(describe_user_overrides(ON_GPU, theirs)) == [
        "PYTORCH_CUDA_ALLOC_CONF=backend:native from your environment, instead of "
        "PYTORCH_ALLOC_CONF=expandable_segments:True",
        "NCCL_DEBUG=INFO from your environment, instead of WARN",
    ]
    assert len(list(describe_user_overrides(ON_GPU, {"TORCH_FR_DUMP_TEMP_FILE": "/dumps/rank_"}))) == 1
    assert not list(describe_user_overrides(ON_GPU, {setting.name: setting.value for setting in ON_GPU}))


def test_a_rank_that_another_torchrun_started_makes_what_it_still_can() -> None:
    environment = {"NCCL_DEBUG": "INFO"}
    words = list(apply_late_settings(ON_GPU, environment))
    assert environment.pop("NCCL_DEBUG") == "INFO"
    assert environment.keys() == {setting.name for setting in ON_GPU} - {"NCCL_DEBUG", "PYTORCH_ALLOC_CONF"}
    assert words == [
        "not set, and too late to set in this process: PYTORCH_ALLOC_CONF=expandable_segments:True; start the run with "
        "`shoestring train` or launch/torchrun.sh, or set them before torchrun"
    ]


def test_the_launcher_hands_the_settings_to_ranks_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for count, on_gpu in ((4, True), (8, False)):  # two ranks per GPU compute on the CPU
        made = launcher._environment(configured("auto"), LocalRanks(count, ()), {"OWN": "1"})
        assert ("CUDA_DEVICE_MAX_CONNECTIONS" in made) is on_gpu
        assert made["OWN"] == "1"
    assert "NCCL_DEBUG" not in launcher._environment(configured("cpu"), LocalRanks(4, ()), {})


def test_ranks_of_gpus_are_bound_where_that_cannot_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    local = LocalRanks(4, ("--nproc-per-node=4",))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(NumaSupport, "detect", lambda: TWO_NODES)
    assert launcher._torchrun(configured("auto"), local) == ("--nproc-per-node=4", NUMA_BINDING_FLAG)
    assert launcher._torchrun(configured("cpu"), local) == ("--nproc-per-node=4",)
    for facts, why in (
        (replace(TWO_NODES, cpus_by_node=TWO_NODES.cpus_by_node[:1]), "one NUMA node"),
        (replace(TWO_NODES, has_numactl=False), "install it"),
        (replace(TWO_NODES, torchrun_has_flag=False), "no --numa-binding"),
        (replace(TWO_NODES, allowed_cpus=frozenset({0, 1})), "CPUs of every NUMA node"),
    ):
        assert why in (numa_binding_blocker(facts, on_gpu=True) or "")
        monkeypatch.setattr(NumaSupport, "detect", lambda facts=facts: facts)
        assert launcher._torchrun(configured("auto"), local) == local.torchrun_arguments


def test_cpus_of_numa_nodes_are_read(tmp_path: Path) -> None:
    assert parse_cpu_list("0-2,8\n") == {0, 1, 2, 8}
    for number, cpus in enumerate(("0-1\n", "2\n", "\n")):  # only the last has memory
        (tmp_path / f"node{number}").mkdir()
        (tmp_path / f"node{number}" / "cpulist").write_text(cpus)
    assert NumaSupport.detect(tmp_path).cpus_by_node == (frozenset({0, 1}), frozenset({2}))
    assert NumaSupport.detect(tmp_path / "nowhere").cpus_by_node == ()


def test_a_rank_says_what_differs_before_cuda_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    for setting in environment_settings(tmp_path):  # so that what is set here ends with the test
        monkeypatch.setenv(setting.name, os.environ.get(setting.name, ""))
        if setting.name != "NCCL_DEBUG":
            monkeypatch.delenv(setting.name)
    config = compose_run_config([f"training.run_dir={tmp_path}"])
    worker._apply_settings(config, TorchrunEnvironment(rank=1, local_rank=1, world_size=2))
    assert capsys.readouterr().err == ""
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    worker._apply_settings(config, TorchrunEnvironment(rank=0, local_rank=0, world_size=2))
    assert "shoestring train: NCCL_DEBUG=INFO from your environment, instead of WARN\n" in capsys.readouterr().err
    assert (tmp_path / "flight_recorder").is_dir()


def test_products_on_a_gpu_are_added_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    before = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    try:
        device = pick_device("auto", TorchrunEnvironment(rank=0, local_rank=0, world_size=1))
        assert device == torch.device("cuda", 0)
        assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction is False
    finally:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = before


def test_which_ranks_compute_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [uses_gpus("auto", ranks) for ranks in (1, 2, 3)] == [True, True, False]
    assert uses_gpus("cuda", 3)
    assert not uses_gpus("cpu", 1)
