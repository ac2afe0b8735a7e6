"""FP8 in every layout: the numbers of one process that computes by the NumPy definition."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import timedelta

import pytest
import torch
from torch import Tensor

from shoestring.comm.groups import ProcessGroups
from shoestring.comm.pending import open_worker
from shoestring.comm.wire import Format
from shoestring.tests.parity.layouts import Layout, Padding
from shoestring.tests.parity.runner import build, run_layout, run_rank, take_step
from shoestring.tests.parity.test_overlap import results
from shoestring.tests.processes import run_processes
from shoestring.trainer.model.experts import Experts
from shoestring.trainer.precision.fp8 import Fp8
from shoestring.trainer.precision.linear import Linear
from shoestring.trainer.precision.reference import Reference
from shoestring.trainer.precision.tiles import Blocks, Scales

ONE = Layout(1, 1, 1, 1, layers=2, fp8=True)
LAYOUTS = [
    ONE,
    Layout(2, 1, 1, 1, Padding.RAGGED, layers=2, fp8=True),
    Layout(1, 2, 2, 0, Padding.RAGGED, layers=2, fp8=True),
    Layout(1, 1, 3, 0, pp=2, schedule="zb1p", layers=3, fp8=True),  # weight gradients in instructions of their own
    Layout(2, 1, 2, 1, schedule="dualpipev", layers=2, exchange="two_hop", node_size=1, fp8=True),
    Layout(2, 1, 1, 0, layers=2, fp8=True, wire=Format.FP8),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name.replace(" ", "-"))
def test_a_layout_does_what_one_process_does(layout: Layout) -> None:
    errors = run_layout(layout, 2)
    print(f"{layout.name}  {errors.line()}")
    assert not errors.over(layout.tolerance), errors


def test_rows_that_cross_in_fp8_change_no_bit() -> None:
    native = Layout(2, 1, 1, 0, layers=2, fp8=True)
    for ours, theirs in zip(
        run_processes(2, run_rank, native, 2, None),
        run_processes(2, run_rank, replace(native, wire=Format.FP8), 2, None),
        strict=True,
    ):
        first, second = results(ours), results(theirs)
        assert not [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]


@dataclass(frozen=True)
class Counting(Reference):
    """Counts how often each weight is quantised."""

    times: Counter[int] = field(default_factory=Counter)

    def blocks(self, weight: Tensor, scales: Scales) -> Blocks:
        self.times[weight.data_ptr()] += 1
        return super().blocks(weight, scales)


def test_a_step_of_several_micro_batches_quantises_each_weight_once() -> None:
    layout, counting = replace(ONE, micro_batches=3), Counting()
    groups = ProcessGroups.create(layout.topology, 0, timedelta(seconds=60))
    with closing(open_worker(groups.ep, torch.device("cpu"))) as worker:
        stepper, gradients = build(layout, layout.stages, groups, worker)
        stepper.model.use_fp8(Fp8(counting))
        for step in range(2):
            take_step(stepper, gradients, layout, step, 0)
            assert set(counting.times.values()) == {step + 1}
    modules = [module for module in stepper.model.modules() if isinstance(module, Linear | Experts)]
    weights = [weight for module in modules for weight in module.parameters(recurse=False)]
    assert len(counting.times) == len(weights) - 1  # all but the head
