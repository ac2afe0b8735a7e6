"""FP8 in every layout: the numbers of one process that computes by the NumPy definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shoestring.comm.wire import Format
from shoestring.tests.parity.layouts import Layout, Padding
from shoestring.tests.parity.runner import run_layout, run_rank
from shoestring.tests.parity.test_overlap import results
from shoestring.tests.processes import run_processes

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
