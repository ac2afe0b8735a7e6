"""Overlap of a forward and a backward, and recomputed activations, change no bit."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, product

import pytest
import torch

from shoestring.tests.parity.layouts import EVERYTHING, REPORT, Layout, Padding
from shoestring.tests.parity.outcome import results
from shoestring.tests.parity.runner import run_rank
from shoestring.tests.processes import run_processes
from shoestring.trainer.model.recompute import RecomputeModule

STEPS = 3
FP32 = torch.float32
LAYOUTS = [
    Layout(2, 1, 4, 1, Padding.RAGGED, schedule="dualpipev", layers=4, dtype=FP32),
    Layout(2, 1, 4, 0, Padding.RAGGED, schedule="dualpipev", layers=4, dtype=FP32, exchange="two_hop", node_size=1),
    Layout(1, 1, 4, 1, Padding.EMPTY, pp=2, schedule="dualpipe", layers=3, dtype=FP32),
    Layout(2, 1, 6, 2, Padding.RAGGED, pp=2, schedule="dualpipe", dtype=FP32, exchange="two_hop", node_size=1),
    Layout(2, 1, 4, 1, Padding.EMPTY, pp=2, schedule="dualpipev", layers=5, dtype=FP32),
]
POLICIES = (REPORT, EVERYTHING)


def every_layout() -> Iterator[Layout]:
    """Yield both schedules with FB on two pipeline ranks, both exchanges, with and without MTP."""
    for schedule, exchange, mtp in product(("dualpipev", "dualpipe"), ("flat", "two_hop"), (0, 1)):
        yield Layout(
            2, 1, 6, mtp, Padding.RAGGED, pp=2, schedule=schedule, layers=5, dtype=FP32, exchange=exchange, node_size=1
        )


def run(layout: Layout) -> list[dict[str, torch.Tensor]]:
    """Return every rank's results."""
    return list(map(results, run_processes(layout.topology.world_size, run_rank, layout, STEPS, None)))


def assert_equal_bits(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        assert not [name for name, tensor in mine.items() if not torch.equal(tensor, other[name])]


def identifier(value: Layout | frozenset[RecomputeModule]) -> str:
    return value.name.replace(" ", "-") if isinstance(value, Layout) else "+".join(sorted(value))


@pytest.mark.parametrize(("layout", "recompute"), [*zip(LAYOUTS, cycle(POLICIES), strict=False)], ids=identifier)
def test_neither_overlap_nor_recomputing_change_a_bit(layout: Layout, recompute: frozenset[RecomputeModule]) -> None:
    serial = run(replace(layout, overlap=False))
    assert_equal_bits(run(layout), serial)
    assert_equal_bits(run(replace(layout, recompute=recompute)), serial)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*every_layout()], ids=identifier)
def test_so_on_every_kind_of_layout(layout: Layout) -> None:
    serial = run(replace(layout, overlap=False))
    assert_equal_bits(run(layout), serial)
    assert_equal_bits(run(replace(layout, recompute=REPORT)), serial)
    assert_equal_bits(run(replace(layout, recompute=EVERYTHING, overlap=False)), serial)
