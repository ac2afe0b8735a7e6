"""Sizes that no machine holds are refused by arithmetic, before any allocation that grows with them."""

import time

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.launch.compose import compose_run_config
from shoestring.launch.run.preflight import (
    MAX_RANKS_PER_CORE,
    MachineCapacity,
    capacity_problems,
    run_preflight_checks,
)
from shoestring.trainer.config import RunConfig

SMALL = MachineCapacity(cpu_cores=2, host_bytes=24e9, gpu_bytes=None, max_tasks=None)
ONE = ("topology=single", "schedule=1f1b", "training.device=cpu")


def configured(*overrides: str) -> RunConfig:
    return compose_run_config([*ONE, *overrides])


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ("model.hidden_size=1e9", "model.hidden_size"),
        ("model.n_routed_experts=1e8", "model.n_routed_experts"),
        ("model.num_hidden_layers=1e7", "model.num_hidden_layers"),
        ("model.vocab_size=1e9", "model.vocab_size"),
        ("model.num_attention_heads=1e9", "model.num_attention_heads"),
        ("model.intermediate_size=1e12", "model.intermediate_size"),
        ("model.num_nextn_predict_layers=1e6", "model.num_nextn_predict_layers"),
        ("model.n_shared_experts=1e9", "model.n_shared_experts"),
        ("model.num_experts_per_tok=1e7", "model.num_experts_per_tok"),
        ("model.q_lora_rank=1e7", "model.q_lora_rank"),
        ("training.global_batch_size=1e30", "training.global_batch_size"),
        ("training.global_batch_size=1e9", "training.global_batch_size"),
        ("training.tokens=1e30", "training.tokens"),
        ("training.sequence_length=1e12", "training.sequence_length"),
        ("training.collective_timeout_seconds=1e15", "training.collective_timeout_seconds"),
        ("training.stop_seconds=1e15", "training.stop_seconds"),
        ("schedule.micro_batch_size=1e9", "schedule.micro_batch_size"),
        ("schedule=interleaved schedule.chunks=1e8", "schedule.chunks"),
        ("topology.pp=1e6", "topology.pp"),
        ("topology.edp=1e9", "topology.edp"),
        ("topology.gpus_per_node=1e9", "topology.gpus_per_node"),
        (
            "training.rampup_start_batch_size=2 training.rampup_batch_size_increment=2 training.rampup_tokens=9 "
            "training.global_batch_size=1e9",
            "training.rampup_batch_size_increment",
        ),
    ],
)
def test_each_size_has_a_limit(overrides: str, field: str) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError) as refused:
        configured(*overrides.split())
    assert field in {problem.field for problem in refused.value.problems}
    assert any(words in str(refused.value) for words in ("at most", "more than"))
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("topology.edp=512 training.global_batch_size=512", "asks for 512 ranks on this machine, which has 2 cores"),
        ("model.hidden_size=1048576", "parameters and their optimizer state alone"),
        ("model.hidden_size=65536 model.moe_intermediate_size=1048576", "parameters and their optimizer state alone"),
        ("model.n_routed_experts=65536", "parameters and their optimizer state alone"),
        ("training.sequence_length=16777216 schedule.micro_batch_size=8", "one activation of the 134,217,728 tokens"),
    ],
)
def test_what_is_too_large_for_this_machine(overrides: str, words: str) -> None:
    config = configured(*overrides.split())
    (problem,) = capacity_problems(config, config.topology.world_size, SMALL)
    assert words in str(problem)


def test_what_fits_is_not_refused() -> None:
    config = configured()
    assert list(capacity_problems(config, 1, SMALL)) == []
    assert list(capacity_problems(config, 2 * MAX_RANKS_PER_CORE, SMALL)) == []


def test_processes_need_memory_and_may_be_limited_in_number() -> None:
    config, many = configured(), 2 * MAX_RANKS_PER_CORE
    small = MachineCapacity(2, many * 100e6, None, None)
    assert "10 GB for their processes alone" in str(next(capacity_problems(config, many, small)))
    assert "may start 100 processes" in str(next(capacity_problems(config, many, MachineCapacity(2, 24e9, None, 100))))


def test_a_gpu_has_its_own_memory() -> None:
    room = MachineCapacity(cpu_cores=2, host_bytes=1e15, gpu_bytes=80e9, max_tasks=None)
    assert "of GPU memory" in str(next(capacity_problems(configured("model.hidden_size=1048576"), 1, room)))
    assert list(capacity_problems(configured(), 512, room)) == []  # a GPU's rank does not need a core of the host


def test_deepseek_v3_fits_its_own_cluster() -> None:
    config = compose_run_config(
        [
            "model=deepseek_v3",
            "data.vocab_size=129280",
            "topology.pp=16",
            "topology.ep=64",
            "topology.edp=2",
            "schedule=dualpipe",
            "training.global_batch_size=15360",
            "training.sequence_length=4096",
        ]
    )
    assert (
        list(
            capacity_problems(
                config, 8, MachineCapacity(cpu_cores=128, host_bytes=2e12, gpu_bytes=80e9, max_tasks=None)
            )
        )
        == []
    )


def test_preflight_refuses_sizes_before_it_looks_at_anything_else() -> None:
    config = configured("model.hidden_size=1048576", "data.prepared=/nowhere/at/all")
    with pytest.raises(ConfigError) as refused:
        run_preflight_checks(config, 1, fresh=True)
    assert [problem.field for problem in refused.value.problems] == ["model"]
