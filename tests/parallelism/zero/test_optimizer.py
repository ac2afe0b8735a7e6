"""Sharded masters and moments: the unsharded optimizer's numbers, the bytes of a reduce-scatter, one decision."""

from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shoestring.comm.async_comm import build_async_communicator
from shoestring.comm.groups import Group, ProcessGroups
from shoestring.comm.topology import LinkType, Topology
from shoestring.comm.trace import NULL_RECORDER
from shoestring.comm.traffic import TrafficCounter
from shoestring.parallelism.zero.bucket import Bucket, BucketParameter
from shoestring.parallelism.zero.optimizer import ShardedOptimizer
from shoestring.parallelism.zero.reduce import ALL_GATHER, REDUCE_SCATTER, GradientReducer
from shoestring.tests.processes import World, run_processes
from shoestring.tests.reference.adamw import AdamW as PlainAdamW
from shoestring.tests.reference.adamw import Moments, adamw_step
from shoestring.trainer.optimizer.adamw import AdamW
from shoestring.trainer.optimizer.config import OptimizerConfig

STEPS, RATE = 20, 0.01
# Shards cut parameters, and one bucket is smaller than the alignment.
BUCKETS = ({"matrix": (37, 11), "norm": (50,), "experts": (3, 40, 7)}, {"small": (3,)})
CONFIG = OptimizerConfig(eps=1e-3, weight_decay=0.2, clip_norm=5.0)


def drawn(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, dtype=torch.float64, generator=generator)
        for shapes in BUCKETS
        for name, shape in shapes.items()
    }


def build(
    groups: ProcessGroups, masters: torch.dtype, moments: torch.dtype, weights: torch.dtype
) -> tuple[ShardedOptimizer, dict[str, Tensor]]:
    start = drawn(0)
    parameters = {name: value.to(masters).requires_grad_() for name, value in start.items()}
    buckets = [
        Bucket(
            "bucket",
            [
                BucketParameter(name, parameters[name], has_weight_decay=len(shape) >= 2)
                for name, shape in shapes.items()
            ],
            groups.dense_dp[(0,)],
            moments,
            weights,
        )
        for shapes in BUCKETS
    ]
    worker = build_async_communicator(groups.world, torch.device("cpu"))
    reducer = GradientReducer(buckets, [0, 1], worker, TrafficCounter(groups.topology, groups.rank))
    return ShardedOptimizer(reducer, AdamW(CONFIG), [0, 0], [1, 0], NULL_RECORDER), parameters


def take_step(
    optimizer: ShardedOptimizer, parameters: dict[str, Tensor], step: int, world: Group
) -> tuple[float, dict[str, Tensor]]:
    """Add this rank's gradients and step; the last rank has none."""
    reducer, rank, ranks = optimizer.reducer, world.rank, world.size
    reducer.begin_step()
    if ranks == 1 or rank < ranks - 1:
        for name, grad in drawn(100 * step + rank + 1).items():
            total = parameters[name].grad
            assert total is not None
            total += grad
    reducer.after_instruction(0)
    reducer.finish_reduction()
    norm = reducer.gradient_norm(world)
    optimizer.step(RATE, min(1.0, CONFIG.clip_norm / norm))
    optimizer.wait_for_weights()
    return norm, {name: value.detach().clone() for name, value in parameters.items()}


def train(world: World, masters: torch.dtype, moments: torch.dtype, weights: torch.dtype) -> Any:
    groups = ProcessGroups.create(Topology(edp=world.size), world.rank, timedelta(seconds=30))
    optimizer, parameters = build(groups, masters, moments, weights)
    results = [take_step(optimizer, parameters, step, groups.world) for step in range(STEPS)]
    return [norm for norm, _ in results], results[-1][1]


def plain(ranks: int) -> tuple[list[float], dict[str, Tensor]]:
    """Return the result of one process in FP64, one tensor after another."""
    params, moments, norms = drawn(0), Moments(), []
    for step in range(STEPS):
        shares = [drawn(100 * step + rank + 1) for rank in range(ranks - 1)]
        summed = {name: torch.stack([share[name] for share in shares]).sum(dim=0) for name in params}
        settings = PlainAdamW(RATE, CONFIG.beta1, CONFIG.beta2, CONFIG.eps, CONFIG.weight_decay, CONFIG.clip_norm)
        norms.append(adamw_step(params, summed, moments, settings))
    return norms, params


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)], ids=["fp64", "fp32"])
def test_twenty_steps_are_those_of_the_unsharded_optimizer(ranks: int, dtype: torch.dtype, tolerance: float) -> None:
    norms, params = plain(ranks)
    for own_norms, weights in run_processes(ranks, train, dtype, dtype, dtype):
        assert own_norms == pytest.approx(norms, rel=tolerance)
        for name, weight in weights.items():
            assert float((weight - params[name]).norm() / params[name].norm()) < tolerance


def train_module(world: World, dtype: torch.dtype) -> list[Tensor]:
    """Train a plain module on this rank's rows; the rank with the highest number has no rows."""
    model, rows = small_module(dtype), drawn_rows(dtype)
    group = Group.from_process_group(dist.group.WORLD)
    optimizer = ShardedOptimizer.over_parameters(model.named_parameters(), group, AdamW(CONFIG))
    for _ in range(3):
        optimizer.reducer.begin_step()
        for part in rows.tensor_split(world.size - 1)[world.rank : world.rank + 1]:
            model(part).square().sum().backward()
        optimizer.reducer.finish_reduction()
        optimizer.step(RATE, 1 / world.size)
        optimizer.wait_for_weights()
    optimizer.close()
    return [parameter.detach() for parameter in model.parameters()]


def small_module(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).to(dtype)


def drawn_rows(dtype: torch.dtype) -> Tensor:
    return torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_plain_module_is_trained_as_by_torchs_adamw_in_one_process(ranks: int) -> None:
    model, rows = small_module(torch.float64), drawn_rows(torch.float64)
    parts = [
        {"params": [p for p in model.parameters() if (p.dim() >= 2) == decays], "weight_decay": decay}
        for decays, decay in ((True, CONFIG.weight_decay), (False, 0.0))
    ]
    twin = torch.optim.AdamW(parts, RATE, (CONFIG.beta1, CONFIG.beta2), CONFIG.eps)
    for _ in range(3):
        twin.zero_grad()
        (model(rows).square().sum() / ranks).backward()
        twin.step()
    for weights in run_processes(ranks, train_module, torch.float64):
        for ours, theirs in zip(weights, model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", [2, 4])
def test_bf16_weights_are_the_rounded_masters_on_every_rank(ranks: int) -> None:
    """Rounding changes no master: after twenty steps the weights are those of FP32 weights, rounded."""
    narrow = run_processes(ranks, train, torch.float32, torch.bfloat16, torch.bfloat16)
    wide = run_processes(ranks, train, torch.float32, torch.bfloat16, torch.float32)
    assert all(norms == wide[0][0] for norms, _ in (*narrow, *wide))
    for _, weights in narrow:
        assert all(weight.dtype == torch.bfloat16 for weight in weights.values())
        assert all(torch.equal(weight, wide[0][1][name].bfloat16()) for name, weight in weights.items())


def count_bytes(world: World) -> tuple[int, dict[str, int], list[int]]:
    """Return the bytes of one step: sent, counted, and the lengths of the buckets."""
    groups = ProcessGroups.create(Topology(edp=world.size, gpus_per_node=1), world.rank, timedelta(seconds=30))
    optimizer, parameters = build(groups, torch.float32, torch.bfloat16, torch.bfloat16)
    sent, isend = [], dist.isend

    def counted(tensor: Tensor, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return isend(tensor, **kwargs)

    with patch.object(dist, "isend", counted):
        take_step(optimizer, parameters, 0, groups.world)
        first = sum(sent)
        take_step(optimizer, parameters, 1, groups.world)
    assert sum(sent) == 2 * first  # the count restarts each step
    traffic = optimizer.reducer.traffic
    links = {operation: traffic.bytes_by_link(operation=operation) for operation in (REDUCE_SCATTER, ALL_GATHER)}
    counts = {operation: by_link[LinkType.INFINIBAND] for operation, by_link in links.items()}
    assert all(by_link[LinkType.LOOPBACK] == by_link[LinkType.NVLINK] == 0 for by_link in links.values())
    return first, counts, [bucket.grads_N.numel() for bucket in optimizer.reducer.buckets]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_sends_no_more_than_a_reduce_scatter_must(ranks: int) -> None:
    """(G - 1) / G of the gradients in FP32, where an all-reduce sends twice that; then as much of the BF16 weights."""
    for sent, counts, lengths in run_processes(ranks, count_bytes):
        share = sum(lengths) * (ranks - 1) // ranks
        assert counts == {REDUCE_SCATTER: 4 * share, ALL_GATHER: 2 * share}
        assert sent == sum(counts.values())


def alone(size: int, rank: int) -> Group:
    """Return one rank of a group of `size`, without the others."""
    return Group(tuple(range(size)), None, rank, timedelta(seconds=1))


@pytest.mark.parametrize("size", [1, 2, 4, 64])
def test_bytes_a_parameter(size: int) -> None:
    """Report §3.3.2 and ZeRO-1: 2 for BF16 weights, 4 for FP32 gradients, 4 / d for masters and for both moments."""
    parameter = torch.zeros(64 * 64, 64, requires_grad=True)
    members = [BucketParameter("weight", parameter, has_weight_decay=True)]
    bucket = Bucket("", members, alone(size, 0), torch.bfloat16, torch.bfloat16)
    tensors = [value for value in vars(bucket).values() if isinstance(value, Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert sum(storages.values()) / parameter.numel() == 6 + 8 / size
    assert parameter.untyped_storage().data_ptr() == bucket.weights_N.data_ptr()
    assert parameter.grad is not None
    assert parameter.grad.untyped_storage().data_ptr() == bucket.grads_N.data_ptr()


@pytest.mark.parametrize("size", [1, 3, 4])
def test_what_ranks_own_meets_without_overlap(size: int) -> None:
    """Whole parameters can be written from the shards, whatever the layout."""
    start = drawn(0)
    found = {name: torch.full((value.numel(),), torch.nan, dtype=torch.float64) for name, value in start.items()}
    for rank in range(size):
        members = [
            BucketParameter(name, value.clone().requires_grad_(), value.ndim >= 2) for name, value in start.items()
        ]
        bucket = Bucket("", members, alone(size, rank), torch.float32, torch.float64)
        for owned in bucket.local_shards():
            part = found[owned.name][owned.offset : owned.offset + owned.master.numel()]
            assert part.isnan().all()
            part.copy_(owned.master)
            assert owned.shape == start[owned.name].shape
            assert owned.exp_avg.shape == owned.exp_avg_sq.shape == owned.master.shape
            owned.master.zero_()
        assert not bucket.master_n.any()  # they are views
    assert all(torch.equal(found[name].view_as(value), value) for name, value in start.items())


def test_the_border_of_weight_decay_may_cut_a_shard() -> None:
    """Elements of matrices decay, those of norms do not, wherever a shard begins and ends."""
    for size in (1, 3, 4):
        decaying = torch.zeros(0, dtype=torch.bool)
        for rank in range(size):
            parameters = {name: value.float() for name, value in drawn(0).items()}
            members = [
                BucketParameter(name, value.requires_grad_(), value.ndim >= 2) for name, value in parameters.items()
            ]
            bucket = Bucket("", members, alone(size, rank), torch.float32, torch.float32)
            own = torch.zeros(bucket.shard_size, dtype=torch.bool)
            for part, decays in bucket.slices_by_weight_decay():
                own[part] = decays
            decaying = torch.cat((decaying, own))
        for extent in bucket.parameter_ranges:
            assert (decaying[extent.begin : extent.end] == (extent.name in ("matrix", "experts"))).all()
