"""The memory that a rank needs as predicted, against every allocation of real ranks."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch

from shoestring.comm.groups import ProcessGroups
from shoestring.launch.compose import compose_run
from shoestring.tests.processes import World, run_processes
from shoestring.trainer.build import stages_of
from shoestring.trainer.memory.forecast import MARGIN, RunMemory
from shoestring.trainer.memory.measured import MeasuredMemory, measure

CPU = torch.device("cpu")
BASE = "model=tiny model.num_hidden_layers=3 training.sequence_length=128 training.global_batch=8"
QUICK = (
    "topology.ep=2",
    "topology.pp=2 schedule=zb1p recompute=deepseek_v3",
    "topology.pp=2 topology.ep=2 schedule=dualpipev model.num_hidden_layers=4",
    "precision=fp8 recompute=deepseek_v3 model.num_hidden_layers=2 model.num_nextn_predict_layers=0"
    " schedule.micro_batch=4",
)
SLOW = (
    "",
    "schedule.micro_batch=4 recompute=everything",
    "topology.edp=2 precision=bf16 optimizer.ema_decay=0.9",
    "topology.ep=4 exchange=two_hop topology.gpus_per_node=2",
    "topology.pp=2 schedule.micro_batch=2",
    "topology.pp=2 schedule=gpipe precision=bf16 recompute=deepseek_v3",
    "topology.pp=2 topology.ep=2 schedule=dualpipe recompute=deepseek_v3 training.global_batch=16",
    "topology.pp=2 topology.edp=2 schedule=interleaved model.num_hidden_layers=4 training.global_batch=16",
    "topology.ep=2 exchange=two_hop_fp8 precision=fp8 optimizer.moments=float32",
    "topology.pp=2 schedule=zb1p precision=fp8 recompute=deepseek_v3",
)
ONE_RANK = "topology.ep=4 training.global_batch=4"


def measured(world: World, overrides: list[str], skewed: bool) -> MeasuredMemory:
    config = compose_run(overrides)
    limit = timedelta(seconds=60)
    groups = ProcessGroups.create(config.topology, world.rank, limit, stages_of(config).all_holders())
    return measure(config, groups, CPU, skewed=skewed)


def run(overrides: str, *, skewed: bool = False) -> tuple[RunMemory, list[MeasuredMemory]]:
    described = f"{BASE} {overrides}".split()
    memory = RunMemory(compose_run(described), CPU)
    ranks = memory.config.topology.world_size
    return memory, run_processes(ranks, measured, described, skewed, timeout=200)


@pytest.mark.parametrize(
    "overrides", [*QUICK, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)], ids=lambda o: o or "single"
)
def test_predicted_is_what_is_allocated(overrides: str) -> None:
    memory, ranks = run(overrides)
    topology = memory.config.topology
    for rank, found in enumerate(ranks):
        predicted = memory.of(topology.pp_rank(rank))
        errors = predicted.between / found.between - 1, predicted.total / found.total - 1
        print(f"rank {rank}: between instructions {errors[0]:+.1%}, at the worst moment {errors[1]:+.1%}")
        assert predicted.state == found.state  # to the byte
        assert abs(errors[0]) <= MARGIN
        assert abs(errors[1]) <= MARGIN
        assert found.between > 0.1 * found.total  # or the last line would say little of activations


def test_all_tokens_on_one_rank_stay_within_the_bound() -> None:
    memory, ranks = run(ONE_RANK, skewed=True)
    for rank, found in enumerate(ranks):
        predicted = memory.of(0, memory.rows_if_skewed(rank))
        print(f"rank {rank}: {found.total:,} bytes, predicted {predicted.total:,.0f}, bound {memory.bound(0):,.0f}")
        assert found.total == pytest.approx(predicted.total, rel=MARGIN)
        assert found.between == pytest.approx(predicted.between, rel=MARGIN)
        assert found.total <= memory.bound(0)
    overloaded, *idle = ranks
    assert all(overloaded.total > found.total for found in idle)


@pytest.mark.slow
def test_without_blocks_the_overloaded_rank_needs_more() -> None:
    blocks, whole = (run(f"{ONE_RANK} recompute.expert_rows={rows}", skewed=True) for rows in (128, 2**20))
    fewer, more = blocks[1][0], whole[1][0]
    saved = whole[0].of(0, whole[0].most_rows).total - blocks[0].of(0, blocks[0].most_rows).total
    assert more.between - fewer.between > 0.2 * more.between
    assert more.total - fewer.total == pytest.approx(saved, rel=0.2)


def test_the_bound_covers_even_routing_and_falls_with_the_block() -> None:
    def bound(rows: int) -> float:
        described = f"{BASE} {ONE_RANK} recompute.expert_rows={rows}"
        memory = RunMemory(compose_run(described.split()), CPU)
        assert memory.bound(0) > memory.of(0).total
        return memory.bound(0)

    assert bound(128) < bound(1024) < bound(2**20)
