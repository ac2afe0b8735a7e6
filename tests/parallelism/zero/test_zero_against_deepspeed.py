"""DeepSpeed's BF16_Optimizer as an independent reference: equal weights to the last bit after twenty steps.

It is driven as a library: its own flat buffers, partitions and `step()`, and an all-reduce of its FP32 gradients. Sums
are the same in any order here: gradients are small multiples of a power of two.
"""

import os
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shoestring.comm.async_comm import build_async_communicator
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.comm.trace import NULL_RECORDER
from shoestring.comm.traffic import TrafficCounter
from shoestring.parallelism.zero.bucket import Bucket, BucketParameter
from shoestring.parallelism.zero.optimizer import ShardedOptimizer
from shoestring.parallelism.zero.reduce import GradientReducer
from shoestring.tests.processes import World, run_processes
from shoestring.trainer.optimizer.adamw import AdamW
from shoestring.trainer.optimizer.config import OptimizerConfig

pytest.importorskip("deepspeed", reason="deepspeed is not installed; it is in the extra `dev`")

STEPS = 20
SHAPES = {"matrix": (64, 48), "experts": (3, 64, 32), "norm": (128,)}
CONFIG = OptimizerConfig(weight_decay=0.2)


def start() -> dict[str, Tensor]:
    """Return initial weights in BF16: DeepSpeed makes its masters from the rounded weights."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).bfloat16().requires_grad_() for name, shape in SHAPES.items()}


def gradients(step: int, rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    drawn = {name: torch.randint(-512, 512, shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: value.float() / 1024 for name, value in drawn.items()}


def rate(step: int) -> float:
    return 0.01 / (step + 1)


def ours(world: World, weights: torch.dtype) -> dict[str, Tensor]:
    """Return our weights after twenty steps; in FP32 they are the masters."""
    groups = ProcessGroups.create(Topology(edp=world.size), world.rank, timedelta(seconds=30))
    parameters = {name: value.detach().float().requires_grad_() for name, value in start().items()}
    members = [BucketParameter(name, value, has_weight_decay=value.ndim >= 2) for name, value in parameters.items()]
    buckets = [Bucket("", members, groups.dense_dp[(0,)], torch.float32, weights)]
    worker = build_async_communicator(groups.world, torch.device("cpu"))
    reducer = GradientReducer(buckets, [0], worker, TrafficCounter(groups.topology, world.rank))
    optimizer = ShardedOptimizer(reducer, AdamW(CONFIG), [0], [0], NULL_RECORDER)
    for step in range(STEPS):
        reducer.begin_step()
        for name, grad in gradients(step, world.rank).items():
            total = parameters[name].grad
            assert total is not None
            total += grad
        reducer.finish_reduction()
        optimizer.step(rate(step))
        optimizer.wait_for_weights()
    optimizer.close()
    return {name: value.detach() for name, value in parameters.items()}


def theirs(world: World) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return DeepSpeed's weights and masters after twenty steps."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(world.rank), "WORLD_SIZE": str(world.size), "LOCAL_RANK": "0"}
    import deepspeed
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.utils.timer import NoopTimer

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled, which takes half a minute
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo", dist_init_required=False, auto_mpi_discovery=False)
    parameters = start()
    decayed = [value for value in parameters.values() if value.ndim >= 2]
    kept = [value for value in parameters.values() if value.ndim < 2]
    inner = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": CONFIG.weight_decay}, {"params": kept, "weight_decay": 0.0}],
        betas=(CONFIG.beta1, CONFIG.beta2),
        eps=CONFIG.eps,
        fused=True,
    )
    optimizer: Any = BF16_Optimizer(
        inner,
        {value: name for name, value in parameters.items()},
        DeepSpeedBF16Config(enabled=True, immediate_grad_update=False),
        clip_grad=0.0,
        dp_process_group=dist.group.WORLD,
        timers=NoopTimer(),
        grad_acc_dtype=torch.float32,
    )
    groups = ((decayed, optimizer.fp32_groups_gradients[0]), (kept, optimizer.fp32_groups_gradients[1]))
    names = {value: name for name, value in parameters.items()}
    for step in range(STEPS):
        drawn = gradients(step, world.rank)
        for index, (members, totals) in enumerate(groups):
            for place, (parameter, total) in enumerate(zip(members, totals, strict=True)):
                total += drawn[names[parameter]].flatten()
                optimizer.fp32_groups_has_gradients[index][place] = True
        for flat in optimizer.get_grads_for_reduction()[0]:
            dist.all_reduce(flat)
        for group in inner.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
    masters = {}
    for (members, _), shard in zip(groups, optimizer.fp32_groups_flat_partition, strict=True):
        shards = [torch.empty_like(shard) for _ in range(world.size)]
        dist.all_gather(shards, shard.detach())
        flat = torch.cat(shards)
        for parameter in members:
            masters[names[parameter]] = flat[: parameter.numel()].view_as(parameter)
            flat = flat[parameter.numel() :]
    return {name: value.detach().clone() for name, value in parameters.items()}, masters


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_twenty_steps_are_deepspeed_s_to_the_last_bit(ranks: int) -> None:
    expected = run_processes(ranks, theirs, timeout=120)
    narrow, wide = (run_processes(ranks, ours, dtype) for dtype in (torch.bfloat16, torch.float32))
    for own_weights, own_masters, (weights, masters) in zip(narrow, wide, expected, strict=True):
        for name, begin in start().items():
            assert own_weights[name].dtype == weights[name].dtype == torch.bfloat16
            assert not torch.equal(weights[name], begin)
            assert torch.equal(own_weights[name], weights[name]), name
            assert torch.equal(own_masters[name], masters[name]), name
