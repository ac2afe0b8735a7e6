"""The learning rate as a function of consumed tokens."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from shoestring.tests.trainer.optimizer.rates import RATES
from shoestring.trainer.optimizer.config import OptimizerConfig


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (0, 0.0),
        (1, 2.2e-6),
        (50, 1.1e-4),
        (100, 2.2e-4),
        (101, 2.2e-4),
        (399, 2.2e-4),
        (400, 2.2e-4),
        (550, 2.2e-5 + 1.98e-4 * 0.5 * (1 + math.sqrt(0.5))),
        (700, 1.21e-4),
        (850, 2.2e-5 + 1.98e-4 * 0.5 * (1 - math.sqrt(0.5))),
        (1000, 2.2e-5),
        (10**15, 2.2e-5),
    ],
)
def test_rate(tokens: int, rate: float) -> None:
    assert RATES.learning_rate_at(tokens) == pytest.approx(rate, rel=1e-14)


def test_rate_is_exact_at_the_borders() -> None:
    assert RATES.learning_rate_at(100) == RATES.learning_rate_at(399) == 2.2e-4
    assert RATES.learning_rate_at(1000) == RATES.learning_rate_at(5000) == 2.2e-5


def test_rate_never_rises_after_the_warm_up_nor_jumps() -> None:
    rates = [RATES.learning_rate_at(tokens) for tokens in range(1100)]
    steps = [after - before for before, after in pairwise(rates)]
    assert all(step == pytest.approx(2.2e-6, rel=1e-9) for step in steps[:100])
    assert all(step <= 0 for step in steps[100:])
    steepest = 1.98e-4 * math.pi / 2 / 600  # of the cosine, half-way down
    assert min(steps) >= -1.0001 * steepest


def test_parts_of_the_schedule_may_be_left_out() -> None:
    assert replace(RATES, warmup_tokens=0).learning_rate_at(0) == 2.2e-4
    assert replace(RATES, constant_tokens=0, decay_tokens=0).learning_rate_at(99) == pytest.approx(0.99 * 2.2e-4)
    assert replace(RATES, constant_tokens=0, decay_tokens=0).learning_rate_at(100) == 2.2e-5
    assert replace(RATES, decay_tokens=0).learning_rate_at(400) == 2.2e-5


def test_the_report_s_schedule() -> None:
    step = 15_360 * 4_096
    report = OptimizerConfig(
        warmup_tokens=2_000 * step, constant_tokens=10**13 - 2_000 * step, decay_tokens=43 * 10**11
    )
    assert report.learning_rate_at(step) == pytest.approx(2.2e-4 / 2_000)
    assert report.learning_rate_at(10**13 - 1) == 2.2e-4
    assert report.learning_rate_at(10**13 + 215 * 10**10) == pytest.approx(1.21e-4)
    assert report.learning_rate_at(143 * 10**11) == 2.2e-5
