"""One data-parallel model with Shoestring's sharded optimizer, torch's ZeroRedundancyOptimizer and torch's FSDP2.

Letters: R rows of a micro-batch, D width.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from shoestring.comm.async_comm import build_async_communicator
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.comm.trace import NULL_RECORDER
from shoestring.comm.traffic import TrafficCounter
from shoestring.parallelism.weight_grad import DelayedWeightGradients, linear
from shoestring.parallelism.zero.bucket import Bucket, BucketParameter
from shoestring.parallelism.zero.optimizer import ShardedOptimizer
from shoestring.parallelism.zero.reduce import GradientReducer
from shoestring.trainer.model.split_backward import SplitBackward
from shoestring.trainer.optimizer.adamw import AdamW
from shoestring.trainer.optimizer.config import OptimizerConfig

CONFIG = OptimizerConfig()
RATE = 1e-3


@dataclass(frozen=True)
class Sizes:
    width: int
    blocks: int
    rows: int
    """Rows of one micro-batch of one rank."""
    micro_batches: int


class Block(nn.Module):
    """Block x + W₂ relu(W₁ x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Parameter(0.02 * torch.randn(4 * width, width))
        self.down = nn.Parameter(0.02 * torch.randn(width, 4 * width))

    def forward(self, x_RD: Tensor) -> Tensor:
        return x_RD + linear(linear(x_RD, self.up).relu(), self.down)


def stack(sizes: Sizes) -> nn.Sequential:
    """Build the blocks, equal on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(sizes.width) for _ in range(sizes.blocks)))


@dataclass(frozen=True)
class Runner:
    """Training with one of the sharded optimizers."""

    step: Callable[[], float]
    """Function that runs one step and returns the gradient norm."""
    weights: Callable[[], dict[str, Tensor]]
    close: Callable[[], None]


def _batches(sizes: Sizes, rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1 + rank)
    return [torch.randn(sizes.rows, sizes.width, generator=generator) for _ in range(sizes.micro_batches)]


def _scale(sizes: Sizes, ranks: int) -> float:
    """Return the factor of a micro-batch's sum of squares in a mean over the global batch."""
    return 1 / (sizes.rows * sizes.width * sizes.micro_batches * ranks)


def _copies(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def shoestring(sizes: Sizes, rank: int, ranks: int, moments: torch.dtype) -> Runner:
    """Shoestring: each block is a bucket, reduced while the backward of earlier blocks runs."""
    groups = ProcessGroups.create(Topology(edp=ranks), rank, timedelta(seconds=60))
    model = stack(sizes)
    members = [
        [BucketParameter(f"{index}.{name}", p, has_weight_decay=True) for name, p in block.named_parameters()]
        for index, block in reversed(list(enumerate(model)))
    ]
    buckets = [Bucket("", each, groups.dense_dp[(0,)], moments, torch.float32) for each in members]
    async_communicator = build_async_communicator(groups.world, torch.device("cpu"))
    reducer = GradientReducer(buckets, range(len(buckets)), async_communicator, TrafficCounter(groups.topology, rank))
    optimizer = ShardedOptimizer(reducer, AdamW(CONFIG), [0] * len(buckets), range(len(buckets)), NULL_RECORDER)
    batches, scale = _batches(sizes, rank), _scale(sizes, ranks)

    def backward(x_RD: Tensor, *, last: bool) -> None:
        """Run block by block, so that final gradients are known, as in a pipeline program."""
        phases: list[SplitBackward] = []
        for block in model:
            phases.append(SplitBackward(lambda x, block=block: (block(x),), x_RD))
            (x_RD,) = phases[-1].pop_outputs()
        grad, weights = 2 * scale * x_RD, DelayedWeightGradients()
        for index, phase in enumerate(reversed(phases)):
            (grad,) = phase.backward_inputs(weights, grad)
            weights.flush()
            if last:
                reducer.after_instruction(index)

    def step() -> float:
        reducer.begin_step()
        for index, batch in enumerate(batches):
            backward(batch, last=index == len(batches) - 1)
        reducer.finish_reduction()
        norm = reducer.gradient_norm(groups.world)
        optimizer.step(RATE, min(1.0, CONFIG.clip_norm / norm))
        optimizer.wait_for_weights()
        return norm

    return Runner(step, lambda: _copies(dict(model.named_parameters())), optimizer.close)


def _peer(
    sizes: Sizes,
    rank: int,
    ranks: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    unsynchronized: Callable[[bool], AbstractContextManager[object]],
) -> Callable[[], float]:
    """Run a step as torch's documentation does. Both average over ranks, so the loss is multiplied by their number."""
    batches, scale = _batches(sizes, rank), _scale(sizes, ranks) * ranks

    def step() -> float:
        for index, batch in enumerate(batches):
            with unsynchronized(index < len(batches) - 1):
                (scale * model(batch).square().sum()).backward()
        norm: Any = nn.utils.clip_grad_norm_(model.parameters(), CONFIG.clip_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        optimizer.step()
        optimizer.zero_grad()
        return float(norm)

    return step


def zero_redundancy(sizes: Sizes, rank: int, ranks: int) -> Runner:
    """DDP's all-reduce, after which each rank updates some parameters and broadcasts them."""
    model = DistributedDataParallel(stack(sizes))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **_adamw())
    step = _peer(sizes, rank, ranks, model, optimizer, lambda skip: model.no_sync() if skip else nullcontext())
    return Runner(step, lambda: _copies(dict(model.module.named_parameters())), lambda: None)


def fsdp2(sizes: Sizes, rank: int, ranks: int) -> Runner:
    """ZeRO-2 with `fully_shard`: weights stay gathered between forward and backward."""
    model = stack(sizes)
    for block in model:
        fully_shard(block, reshard_after_forward=False)
    whole = fully_shard(model, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(model.parameters(), **_adamw())

    def unsynchronized(skip: bool) -> AbstractContextManager[object]:
        whole.set_requires_gradient_sync(not skip)
        return nullcontext()

    def weights() -> dict[str, Tensor]:
        parameters = model.named_parameters()
        return {name: p.full_tensor().detach().clone() for name, p in parameters if isinstance(p, DTensor)}

    return Runner(_peer(sizes, rank, ranks, model, optimizer, unsynchronized), weights, lambda: None)


def _adamw() -> dict[str, Any]:
    settings = {"betas": (CONFIG.beta1, CONFIG.beta2), "eps": CONFIG.eps, "weight_decay": CONFIG.weight_decay}
    return {"lr": RATE, "fused": True, **settings}


RUNNERS: Mapping[str, Callable[[Sizes, int, int], Runner]] = MappingProxyType(
    {
        "shoestring": lambda sizes, rank, ranks: shoestring(sizes, rank, ranks, torch.float32),
        "shoestring, BF16 moments": lambda sizes, rank, ranks: shoestring(sizes, rank, ranks, torch.bfloat16),
        "DDP + ZeroRedundancyOptimizer": zero_redundancy,
        "FSDP2": fsdp2,
    }
)
