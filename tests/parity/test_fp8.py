"""FP8 in every layout: the numbers of one process that computes by the NumPy definition."""

from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import timedelta

import pytest
import torch
from torch import Tensor

from shoestring.comm.async_comm import build_async_communicator
from shoestring.comm.exchange.wire_format import WireFormat
from shoestring.comm.groups import ProcessGroups
from shoestring.tests.parity.layouts import EVERYTHING, REPORT, Layout, Load, Padding
from shoestring.tests.parity.outcome import results
from shoestring.tests.parity.runner import build, run_layout, run_rank, take_step
from shoestring.tests.processes import World, run_processes
from shoestring.trainer.model.experts import GroupedExperts
from shoestring.trainer.model.linear import Linear
from shoestring.trainer.precision.fp8 import Fp8LinearOps
from shoestring.trainer.precision.fp8_tensors import Fp8Weight, RowwiseFp8Tensor, ScaleFormat
from shoestring.trainer.precision.reference import ReferenceBackend

ONE = Layout(1, 1, 1, 1, layers=2, fp8=True)
LAYOUTS = [
    ONE,
    Layout(2, 1, 1, 1, Padding.RAGGED, layers=2, fp8=True),
    Layout(1, 2, 2, 0, Padding.RAGGED, layers=2, fp8=True),
    Layout(1, 1, 3, 0, pp=2, schedule="zb_h1", layers=3, fp8=True),  # separate instructions for weight gradients
    Layout(2, 1, 2, 1, schedule="dualpipev", layers=2, exchange="two_hop", node_size=1, fp8=True),
    Layout(2, 1, 1, 0, layers=2, fp8=True, wire=WireFormat.FP8),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name.replace(" ", "-"))
def test_a_layout_does_what_one_process_does(layout: Layout) -> None:
    errors = run_layout(layout, 2)
    print(f"{layout.name}  {errors.line()}")
    assert not errors.over(layout.tolerance), errors


FP32, RAGGED = torch.float32, Padding.RAGGED
CROSSING = [
    Layout(2, 1, 1, 0, layers=2, fp8=True),
    Layout(2, 1, 2, 1, RAGGED, Load.IDLE, FP32, layers=2, fp8=True, recompute=REPORT),  # a rank without rows
    Layout(2, 1, 2, 1, RAGGED, Load.BUSY, FP32, layers=2, fp8=True, recompute=EVERYTHING, block=128),
    Layout(2, 1, 4, 1, RAGGED, Load.BUSY, FP32, layers=4, exchange="two_hop", node_size=1, fp8=True, block=128,
           schedule="dualpipev"),
    Layout(4, 1, 1, 0, RAGGED, Load.UNUSED, FP32, layers=2, exchange="two_hop", node_size=2, fp8=True),
]  # fmt: skip


@pytest.mark.parametrize("native", CROSSING, ids=lambda layout: layout.name.replace(" ", "-"))
def test_rows_that_cross_in_fp8_change_no_bit(native: Layout) -> None:
    ranks = native.topology.world_size
    for ours, theirs in zip(
        run_processes(ranks, run_rank, native, 2, None),
        run_processes(ranks, run_rank, replace(native, wire=WireFormat.FP8), 2, None),
        strict=True,
    ):
        first, second = results(ours), results(theirs)
        assert not [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]


@dataclass(frozen=True)
class Quantizing(ReferenceBackend):
    """Counts quantizations with power-of-two scales."""

    times: Counter[str] = field(default_factory=Counter)

    def quantize_rowwise(self, x_XD: Tensor, scales: ScaleFormat) -> RowwiseFp8Tensor:
        self.times[scales] += 1
        return super().quantize_rowwise(x_XD, scales)


def quantized(world: World, layout: Layout) -> int:
    """Return the count of one step of this rank."""
    groups, quantizing = ProcessGroups.create(layout.topology, world.rank, timedelta(seconds=60)), Quantizing()
    with closing(build_async_communicator(groups.ep, torch.device("cpu"))) as worker:
        stepper, gradients = build(layout, layout.stages, groups, worker)
        stepper.model.enable_fp8(Fp8LinearOps(quantizing))
        take_step(stepper, gradients, layout, 0, world.rank)
    return quantizing.times[ScaleFormat.POWER_OF_TWO]


@pytest.mark.parametrize("layout", CROSSING[:3], ids=lambda layout: layout.name.replace(" ", "-"))
@pytest.mark.parametrize("exchange", ["flat", "two_hop"])
def test_rows_that_came_in_fp8_are_not_quantized_again(exchange: str, layout: Layout) -> None:
    """Without a wire in FP8 each routed layer quantizes what it receives, once per micro-batch, in blocks or not."""
    native = replace(layout, exchange=exchange, node_size=1)
    received = native.micro_batches * (native.layers - native.config.first_k_dense_replace + native.mtp)
    ours = run_processes(2, quantized, replace(native, wire=WireFormat.FP8))
    theirs = run_processes(2, quantized, native)
    assert [more - fewer for fewer, more in zip(ours, theirs, strict=True)] == [received] * 2


@dataclass(frozen=True)
class Counting(ReferenceBackend):
    """Counts quantizations of each weight."""

    times: Counter[int] = field(default_factory=Counter)

    def quantize_weight(self, weight: Tensor, scales: ScaleFormat) -> Fp8Weight:
        self.times[weight.data_ptr()] += 1
        return super().quantize_weight(weight, scales)


def test_a_step_of_several_micro_batches_quantizes_each_weight_once() -> None:
    layout, counting = replace(ONE, micro_batches=3), Counting()
    groups = ProcessGroups.create(layout.topology, 0, timedelta(seconds=60))
    with closing(build_async_communicator(groups.ep, torch.device("cpu"))) as worker:
        stepper, gradients = build(layout, layout.stages, groups, worker)
        stepper.model.enable_fp8(Fp8LinearOps(counting))
        for step in range(2):
            take_step(stepper, gradients, layout, step, 0)
            assert set(counting.times.values()) == {step + 1}
    modules = [module for module in stepper.model.modules() if isinstance(module, Linear | GroupedExperts)]
    weights = [weight for module in modules for weight in module.parameters(recurse=False)]
    assert len(counting.times) == len(weights) - 1  # all but the head
