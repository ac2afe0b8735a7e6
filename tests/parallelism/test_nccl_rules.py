"""Every schedule trains under NCCL's rules, with the classes that GPUs use, and equals the plain twin."""

from __future__ import annotations

import pytest

from shoestring.tests.parallelism.nccl_runs import MATRIX, errors_of
from shoestring.tests.parity.layouts import Layout


def identifier(layout: Layout) -> str:
    return f"{layout.schedule}-pp{layout.pp}-mtp{layout.mtp}"


@pytest.mark.parametrize(
    "layout",
    [pytest.param(each, marks=[pytest.mark.slow] if each.pp > 2 else []) for each in MATRIX],
    ids=identifier,
)
def test_a_schedule_trains_under_the_rules(layout: Layout) -> None:
    errors = errors_of(layout)
    assert not errors.over(layout.tolerance), errors
