"""The learning rate by consumed tokens, and AdamW against the plain one."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.parallelism.gradients import Gradients, Replicated
from shoestring.tests.reference.adamw import AdamW, Moments, adamw_step
from shoestring.trainer.optimizer.adamw import build_adamw, set_learning_rate
from shoestring.trainer.optimizer.config import OptimizerConfig

# Warm-up to 100, constant to 400, cosine to 1000.
RATES = OptimizerConfig(
    peak_learning_rate=2.2e-4,
    final_learning_rate=2.2e-5,
    warmup_tokens=100,
    constant_tokens=300,
    decay_tokens=600,
)
SHAPES = {"matrix": (5, 4), "experts": (3, 4, 2), "norm": (6,)}


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
    assert RATES.learning_rate(tokens) == pytest.approx(rate, rel=1e-14)


def test_rate_is_exact_at_the_borders() -> None:
    assert RATES.learning_rate(100) == RATES.learning_rate(399) == 2.2e-4
    assert RATES.learning_rate(1000) == RATES.learning_rate(5000) == 2.2e-5


def test_rate_never_rises_after_the_warm_up_nor_jumps() -> None:
    rates = [RATES.learning_rate(tokens) for tokens in range(1100)]
    steps = [after - before for before, after in pairwise(rates)]
    assert all(step == pytest.approx(2.2e-6, rel=1e-9) for step in steps[:100])
    assert all(step <= 0 for step in steps[100:])
    steepest = 1.98e-4 * math.pi / 2 / 600  # of the cosine, half-way down
    assert min(steps) >= -1.0001 * steepest


def test_parts_of_the_schedule_may_be_left_out() -> None:
    assert replace(RATES, warmup_tokens=0).learning_rate(0) == 2.2e-4
    assert replace(RATES, constant_tokens=0, decay_tokens=0).learning_rate(99) == pytest.approx(0.99 * 2.2e-4)
    assert replace(RATES, constant_tokens=0, decay_tokens=0).learning_rate(100) == 2.2e-5
    assert replace(RATES, decay_tokens=0).learning_rate(400) == 2.2e-5


def test_the_report_s_schedule() -> None:
    step = 15_360 * 4_096
    report = OptimizerConfig(
        warmup_tokens=2_000 * step, constant_tokens=10**13 - 2_000 * step, decay_tokens=43 * 10**11
    )
    assert report.learning_rate(step) == pytest.approx(2.2e-4 / 2_000)
    assert report.learning_rate(10**13 - 1) == 2.2e-4
    assert report.learning_rate(10**13 + 215 * 10**10) == pytest.approx(1.21e-4)
    assert report.learning_rate(143 * 10**11) == 2.2e-5


def tensors(seed: int, dtype: torch.dtype, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {key: torch.randn(shape, dtype=torch.float64, generator=generator) for key, shape in SHAPES.items()}
    return {name: (scale * value).to(dtype) for name, value in drawn.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)], ids=["fp64", "fp32"])
def test_steps_are_those_of_the_plain_adamw(dtype: torch.dtype, tolerance: float) -> None:
    config = OptimizerConfig(weight_decay=0.2, clip_norm=1.5)
    plain, moments = tensors(0, dtype), Moments()
    ours = {name: value.clone().requires_grad_() for name, value in plain.items()}
    optimizer = build_adamw(ours, config)
    groups = ProcessGroups.create(Topology(), 0, timedelta(seconds=1))
    kinds = ((ours["norm"], ours["matrix"]), (ours["experts"],))
    gradients = Gradients(tuple(Replicated(kind, groups.world, counts=True) for kind in kinds), groups.world)
    clipped = []
    for step in range(5):
        scale, rate = (0.01 if step == 2 else 1.0), 0.01 * (step + 1)
        drawn = tensors(step + 1, dtype, scale)
        settings = AdamW(rate, config.beta1, config.beta2, config.eps, config.weight_decay, config.clip_norm)
        expected_norm = adamw_step(plain, drawn, moments, settings)

        for name, value in ours.items():
            value.grad = drawn[name].clone()
        gradients.reduce()
        norm = gradients.norm()
        clipped.append(norm > config.clip_norm)
        if clipped[-1]:
            gradients.scale(config.clip_norm / norm)
            assert gradients.norm() == pytest.approx(config.clip_norm, rel=10 * tolerance)
        set_learning_rate(optimizer, rate)
        optimizer.step()
        assert norm == pytest.approx(expected_norm, rel=1e-12)
    assert clipped == [True, True, False, True, True]
    for name, value in ours.items():
        torch.testing.assert_close(value.detach(), plain[name], rtol=tolerance, atol=tolerance)
        state = optimizer.state[value]
        torch.testing.assert_close(state["exp_avg"], moments.first[name], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(state["exp_avg_sq"], moments.second[name], rtol=tolerance, atol=tolerance)
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == dtype
        assert state["step"].item() == 5


def test_only_matrices_decay() -> None:
    before = tensors(0, torch.float32)
    ours = {name: value.clone().requires_grad_() for name, value in before.items()}
    optimizer = build_adamw(ours, OptimizerConfig(weight_decay=0.5))
    for value in ours.values():
        value.grad = torch.zeros_like(value)
    set_learning_rate(optimizer, 0.1)
    optimizer.step()
    assert torch.equal(ours["norm"].detach(), before["norm"])
    for name in ("matrix", "experts"):
        torch.testing.assert_close(ours[name].detach(), before[name] * 0.95)


def test_state_exists_before_the_first_step() -> None:
    ours = {name: value.requires_grad_() for name, value in tensors(0, torch.float32).items()}
    optimizer = build_adamw(ours, OptimizerConfig())
    for value in ours.values():
        state = optimizer.state[value]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == value.shape
        assert not any(tensor.any() for tensor in state.values())
