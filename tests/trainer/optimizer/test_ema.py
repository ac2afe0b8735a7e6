"""The moving average of the weights: its formula, its background update, and weights untouched by an evaluation."""

import threading
from datetime import timedelta

import pytest
import torch
from torch import Tensor

from shoestring.comm.async_comm import build_async_communicator
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.comm.trace import NULL_RECORDER
from shoestring.comm.traffic import TrafficCounter
from shoestring.parallelism.zero.bucket import Bucket, BucketParameter
from shoestring.parallelism.zero.optimizer import ShardedOptimizer
from shoestring.parallelism.zero.reduce import GradientReducer
from shoestring.tests.comm.late_streams import LateStreams
from shoestring.tests.processes import World, run_processes
from shoestring.trainer.optimizer.adamw import AdamW
from shoestring.trainer.optimizer.config import OptimizerConfig
from shoestring.trainer.optimizer.ema import WeightEMA

DECAY, STEPS = 0.75, 4


def build(groups: ProcessGroups, weights: torch.dtype) -> tuple[ShardedOptimizer, Tensor]:
    parameter = torch.arange(300.0).div(100).requires_grad_()
    members = [BucketParameter("weight", parameter, has_weight_decay=False)]
    buckets = [Bucket("", members, groups.dense_dp[(0,)], torch.bfloat16, weights)]
    worker = build_async_communicator(groups.world, torch.device("cpu"))
    reducer = GradientReducer(buckets, [0], worker, TrafficCounter(groups.topology, groups.rank))
    return ShardedOptimizer(reducer, AdamW(OptimizerConfig()), [0], [0], NULL_RECORDER), parameter


def take_step(optimizer: ShardedOptimizer, parameter: Tensor) -> None:
    optimizer.reducer.begin_step()
    assert parameter.grad is not None
    parameter.grad += 1 + parameter.float()
    optimizer.reducer.finish_reduction()
    optimizer.step(0.125)
    optimizer.wait_for_weights()


def averaged(world: World, weights: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the average and its reference, and the weights before and after the average was in the model."""
    groups = ProcessGroups.create(Topology(edp=world.size), world.rank, timedelta(seconds=30))
    optimizer, parameter = build(groups, weights)
    average = WeightEMA(optimizer, DECAY)
    reference = torch.arange(300.0).div(100)
    for _ in range(STEPS):
        average.wait()
        take_step(optimizer, parameter)
        average.start_update()
        reference = DECAY * reference + (1 - DECAY) * parameter.detach().float()
    before = parameter.detach().clone()
    with average.swapped_into_model():
        inside = parameter.detach().clone()
    return inside, reference, before, parameter.detach().clone()


def test_every_rank_sees_the_average_and_then_its_weights_again() -> None:
    for inside, reference, before, after in run_processes(2, averaged, torch.float32):
        torch.testing.assert_close(inside, reference, rtol=1e-6, atol=1e-6)
        assert torch.equal(before, after)
        assert float((inside - before).abs().max()) > 0.1


def test_the_average_is_of_masters_and_never_rounded_on_the_way() -> None:
    ((wide, _, _, _),) = run_processes(1, averaged, torch.float32)
    ((inside, _, before, after),) = run_processes(1, averaged, torch.bfloat16)
    assert torch.equal(before, after)
    assert inside.dtype == torch.bfloat16
    # The gradients' rounding depends on the weights' rounding; Adam's first steps hardly change.
    torch.testing.assert_close(inside.float(), wide, rtol=2**-7, atol=1e-3)


def moved_through(streams: LateStreams | None) -> list[Tensor]:
    """Return the average after each step, of 300 masters through two halves of 64."""
    groups = ProcessGroups.create(Topology(), 0, timedelta(seconds=1))
    optimizer, parameter = build(groups, torch.float32)
    average, found = WeightEMA(optimizer, DECAY, streams, staged_bytes=2 * 64 * 4), []
    for _ in range(STEPS):
        average.wait()
        take_step(optimizer, parameter)
        average.start_update()
        found.append(torch.cat([part.clone() for _, _, part in average.local_shards()]))
    average.close()
    return found


@pytest.mark.parametrize("late", [False, True], ids=["at once", "as late as may be"])
def test_on_a_separate_stream_it_is_the_same_to_the_last_bit(late: bool) -> None:
    streams = LateStreams(late)
    for staged, plain in zip(moved_through(streams), moved_through(None), strict=True):
        assert torch.equal(staged, plain)
    waits = [line for line in streams.log if line.startswith("average waits")]
    assert waits == ["average waits for computing 1"] * STEPS  # for the masters that the step has just written
    assert sum(line.startswith("host waits") for line in streams.log) == STEPS * 5


def test_it_moves_in_the_background_and_is_waited_for() -> None:
    groups = ProcessGroups.create(Topology(), 0, timedelta(seconds=1))
    optimizer, _ = build(groups, torch.float32)
    average = WeightEMA(optimizer, DECAY)
    go_on, order = threading.Event(), []
    move = average._move

    def slow(updated: object) -> None:
        go_on.wait(10)
        order.append("moved")
        move(None)

    average._move = slow  # type: ignore[method-assign]
    average.start_update()
    order.append("caller")  # start has returned while the average waits
    go_on.set()
    average.wait()
    assert order == ["caller", "moved"]
    average.close()
