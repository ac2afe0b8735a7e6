"""Every schedule trains under NCCL's rules, with the classes that GPUs use, and equals the plain twin."""

from __future__ import annotations

import pytest

from shoestring.tests.comm.nccl_rules import FIRST_CONTACT
from shoestring.tests.parallelism.nccl_runs import MATRIX, Start, errors_of, failure_of
from shoestring.tests.parity.layouts import Layout

SHARED_EMBEDDING = Layout(1, 1, 4, 1, pp=2, schedule="one_f_one_b")
"""MTP embeds tokens on the last stage: its embedding's gradient is summed with that of the first."""


def identifier(layout: Layout) -> str:
    return f"{layout.schedule}-pp{layout.pp}-mtp{layout.mtp}"


def is_quick(layout: Layout) -> bool:
    return (layout.pp, layout.mtp) == (2, 1)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(each, marks=[] if is_quick(each) else [pytest.mark.slow]) for each in MATRIX],
    ids=identifier,
)
def test_a_schedule_trains_under_the_rules(layout: Layout) -> None:
    errors = errors_of(layout)
    assert not errors.over(layout.tolerance), errors


def test_without_a_warm_up_a_receive_ahead_waits_for_ever() -> None:
    failure = failure_of(SHARED_EMBEDDING, Start.COLD)
    assert "of micro-batch 0 from rank" in failure
    assert FIRST_CONTACT in failure


def test_with_pairs_alone_sends_behind_the_listener_wait_for_ever() -> None:
    failure = failure_of(SHARED_EMBEDDING, Start.PAIRS, late_sends=True)
    assert failure.startswith("rank 1: sum of gradients, dense of stage 0 and 1 with ranks 0 failed")
    assert FIRST_CONTACT in failure


def test_with_pairs_alone_sends_before_the_listener_do_not() -> None:
    assert failure_of(SHARED_EMBEDDING, Start.PAIRS, patience=60) == ""
