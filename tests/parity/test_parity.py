"""Every layout gives the results of one process, and every broken convention is detected.

`python -m shoestring.tests.parity` prints the same tables.
"""

import math
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest
import torch

from shoestring.tests.parity.breaks import BREAKS
from shoestring.tests.parity.layouts import QUICK, SLOW, STEPS, Layout, Load, Padding, clip_norm, global_batch
from shoestring.tests.parity.outcome import compare
from shoestring.tests.parity.runner import run_layout
from shoestring.tests.parity.single_process import run_single_process


def identifier(layout: Layout) -> str:
    return "-".join(layout.name.split())


@pytest.mark.parametrize(
    "layout",
    [*QUICK, *(pytest.param(layout, marks=pytest.mark.slow) for layout in SLOW)],
    ids=[identifier(layout) for layout in (*QUICK, *SLOW)],
)
def test_a_layout_does_what_one_process_does(layout: Layout) -> None:
    errors = run_layout(layout, STEPS)
    print(f"{layout.name}  {errors.line()}")
    assert not errors.over(layout.tolerance), errors


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_convention_is_seen_where_it_must_be_and_nowhere_else(name: str) -> None:
    case = BREAKS[name]
    assert case.layout in QUICK  # and so it is right when nothing is broken
    errors = run_layout(case.layout, 1, name)
    assert errors.over(case.layout.tolerance) == case.wrong, errors
    assert errors.over(case.margin * case.layout.tolerance) == case.wrong, errors


def test_not_a_number_is_wrong() -> None:
    layout = QUICK[0]
    reference = run_single_process(layout, 1)
    assert not compare([reference], reference).over(0.0)
    (step,) = reference.steps
    name, gradient = next(iter(step.gradients.items()))
    damaged = replace(step, gradients=step.gradients | {name: gradient * math.nan}, norm=math.nan)
    assert compare([replace(reference, steps=(damaged,))], reference).over(layout.tolerance) == {"grad", "norm"}


def test_the_table_holds_every_pair_of_values() -> None:
    values: dict[str, set[Any]] = {
        "ep": {1, 2, 4},
        "edp": {1, 2},
        "micro_batches": {1, 2, 3},
        "mtp": {0, 1, 2},
        "padding": set(Padding),
        "load": set(Load),
        "dtype": {torch.float64, torch.float32},
    }
    rows = [vars(layout) for layout in (*QUICK, *SLOW)]
    missing = [
        {one: first, other: second}
        for one, other in combinations(values, 2)
        for first, second in product(values[one], values[other])
        if not any(row[one] == first and row[other] == second for row in rows)
    ]
    # A rank that holds every expert cannot be idle or busier than others.
    assert all(pair in ({"ep": 1, "load": Load.IDLE}, {"ep": 1, "load": Load.BUSY}) for pair in missing), missing
    assert len(rows) == len({layout.name for layout in (*QUICK, *SLOW)}) >= 24


@pytest.mark.parametrize("load", Load)
def test_the_load_is_as_uneven_as_the_row_says(load: Load) -> None:
    layout = Layout(4, 1, 1, 2, Padding.RAGGED, load)
    steps = run_single_process(layout, STEPS).steps
    assert [step.norm > clip_norm(number) for number, step in enumerate(steps)] == [True, True, False]
    for step in steps:
        for counts_E in step.counts_E.values():
            of_ranks = counts_E.view(layout.ep, -1).sum(dim=1)
            assert (of_ranks[-1] == 0) == (load is Load.IDLE)
            assert (of_ranks[:-1].sum() == 0) == (load is Load.BUSY)
            assert (counts_E[1::2].sum() == 0) == (load is Load.UNUSED)


@pytest.mark.parametrize("padding", Padding)
def test_the_padding_is_what_the_row_says(padding: Padding) -> None:
    layout = Layout(2, 2, 2, 1, padding)
    for step in range(STEPS):
        _, valid_BW = global_batch(layout, step)
        lengths = valid_BW.sum(dim=1)
        own = layout.sequences_per_micro_batch
        assert (lengths == valid_BW.shape[1]).all() == (padding is Padding.NONE)
        assert (lengths == 0).any() == (padding is not Padding.NONE)
        assert (lengths[-own:] == 0).all() == (padding is Padding.EMPTY)
        assert (len(set(lengths.tolist())) >= 8) == (padding is Padding.RAGGED)
