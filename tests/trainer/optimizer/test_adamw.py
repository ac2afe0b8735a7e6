"""The learning rate by consumed tokens, and AdamW against the plain reference."""

import math
from datetime import timedelta

import pytest
import torch
from torch import Tensor

from shoestring.comm.async_comm import InlineCommunicator
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.comm.trace import NULL_RECORDER
from shoestring.comm.traffic import TrafficCounter
from shoestring.parallelism.zero.bucket import Bucket, BucketParameter
from shoestring.parallelism.zero.optimizer import ShardedOptimizer
from shoestring.parallelism.zero.reduce import SQUARE_SUM_ELEMENTS as NORM_PIECE
from shoestring.parallelism.zero.reduce import GradientReducer
from shoestring.tests.reference.adamw import AdamW as PlainAdamW
from shoestring.tests.reference.adamw import Moments, adamw_step
from shoestring.tests.trainer.optimizer.rates import RATES
from shoestring.trainer.optimizer.adamw import SLICE_ELEMENTS, AdamW, AdamWReference
from shoestring.trainer.optimizer.config import OptimizerConfig

SHAPES = {"matrix": (5, 4), "experts": (3, 4, 2), "norm": (6,)}


def tensors(seed: int, dtype: torch.dtype, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {key: torch.randn(shape, dtype=torch.float64, generator=generator) for key, shape in SHAPES.items()}
    return {name: (scale * value).to(dtype) for name, value in drawn.items()}


def sharded(parameters: dict[str, Tensor], config: OptimizerConfig, moments: torch.dtype) -> ShardedOptimizer:
    """Build the optimizer on one rank, in two buckets."""
    world = ProcessGroups.create(Topology(), 0, timedelta(seconds=1)).world
    members = [BucketParameter(name, value, has_weight_decay=value.ndim >= 2) for name, value in parameters.items()]
    dtype = members[0].parameter.dtype
    buckets = [Bucket("", each, world, moments, dtype) for each in (members[:1], members[1:])]
    reducer = GradientReducer(buckets, [0, 0], InlineCommunicator(), TrafficCounter(Topology(), 0))
    return ShardedOptimizer(reducer, AdamW(config), [0, 0], [0, 1], NULL_RECORDER)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)], ids=["fp64", "fp32"])
def test_steps_are_those_of_the_plain_adamw(dtype: torch.dtype, tolerance: float) -> None:
    config = OptimizerConfig(weight_decay=0.2, clip_norm=1.5)
    plain, moments = tensors(0, dtype), Moments()
    ours = {name: value.clone().requires_grad_() for name, value in plain.items()}
    optimizer = sharded(ours, config, dtype)
    reducer = optimizer.reducer
    clipped = []
    for step in range(5):
        scale, rate = (0.01 if step == 2 else 1.0), 0.01 * (step + 1)
        drawn = tensors(step + 1, dtype, scale)
        settings = PlainAdamW(rate, config.beta1, config.beta2, config.eps, config.weight_decay, config.clip_norm)
        expected_norm = adamw_step(plain, drawn, moments, settings)

        reducer.begin_step()
        for name, value in ours.items():
            assert value.grad is not None
            value.grad += drawn[name]
        reducer.finish_reduction()
        norm = math.sqrt(reducer.sum_of_squares())
        clipped.append(norm > config.clip_norm)
        optimizer.step(rate, config.clip_norm / norm if clipped[-1] else 1.0)
        if clipped[-1]:
            assert math.sqrt(reducer.sum_of_squares()) == pytest.approx(config.clip_norm, rel=10 * tolerance)
        optimizer.wait_for_weights()
        assert norm == pytest.approx(expected_norm, rel=1e-12)
    assert clipped == [True, True, False, True, True]
    assert optimizer.step_count == 5
    state = {owned.name: owned for owned in optimizer.local_shards()}
    for name, value in ours.items():
        torch.testing.assert_close(value.detach(), plain[name], rtol=tolerance, atol=tolerance)
        owned, shape = state[name], value.shape
        assert torch.equal(owned.master.view(shape), value)
        torch.testing.assert_close(owned.exp_avg.view(shape), moments.first[name], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(owned.exp_avg_sq.view(shape), moments.second[name], rtol=tolerance, atol=tolerance)


def test_only_matrices_decay() -> None:
    before = tensors(0, torch.float32)
    ours = {name: value.clone().requires_grad_() for name, value in before.items()}
    optimizer = sharded(ours, OptimizerConfig(weight_decay=0.5), torch.bfloat16)
    optimizer.reducer.begin_step()
    optimizer.step(0.1)
    assert torch.equal(ours["norm"].detach(), before["norm"])
    for name in ("matrix", "experts"):
        torch.testing.assert_close(ours[name].detach(), before[name] * 0.95)


def test_the_norm_counts_every_piece() -> None:
    long = torch.zeros(NORM_PIECE + 77, requires_grad=True)
    reducer = sharded({"short": torch.zeros(3, requires_grad=True), "long": long}, RATES, torch.float32).reducer
    reducer.begin_step()
    assert long.grad is not None
    long.grad.copy_(torch.randn(len(long), generator=torch.Generator().manual_seed(0)))
    reducer.finish_reduction()
    assert math.sqrt(reducer.sum_of_squares()) == pytest.approx(float(long.grad.double().norm()), rel=1e-12)


@pytest.mark.parametrize("masters", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("moments", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_the_fused_rule_does_what_the_reference_does(masters: torch.dtype, moments: torch.dtype) -> None:
    """Ten steps over more than one slice, each from the reference's state: a moment between two numbers of
    its dtype may be rounded up by one and down by the other.
    """
    length, generator = SLICE_ELEMENTS + 77, torch.Generator().manual_seed(0)
    config, unit = OptimizerConfig(), torch.finfo(moments).eps
    master = torch.randn(length, generator=generator, dtype=torch.float64).to(masters)
    state = (master, torch.zeros(length, dtype=moments), torch.zeros(length, dtype=moments))
    for step in range(1, 11):
        grad = torch.randn(length, generator=generator, dtype=torch.float64).to(masters)
        ours = tuple(tensor.clone() for tensor in state)
        for rule, (master, exp_avg, exp_avg_sq) in ((AdamW(config), ours), (AdamWReference(config), state)):
            rule(master, grad, exp_avg, exp_avg_sq, rate=0.01, step=step, decays=step % 2 == 0)
        torch.testing.assert_close(ours[0], state[0], rtol=1e-6, atol=1e-7)
        for moment, reference in zip(ours[1:], state[1:], strict=True):
            assert moment.dtype == moments
            torch.testing.assert_close(moment.double(), reference.double(), rtol=unit, atol=1e-6)
            assert float((moment != reference).double().mean()) < 1e-3 or moments == torch.float32


def test_bf16_moments_stay_near_those_that_are_never_rounded() -> None:
    """Fifty steps of the report's rule: the update is off by less than the 2^-8 that one rounding may cost."""
    length, generator, config = 4096, torch.Generator().manual_seed(1), OptimizerConfig(weight_decay=0.0)
    results = []
    for moments in (torch.bfloat16, torch.float32):
        generator.manual_seed(1)
        master, exp_avg, exp_avg_sq = torch.zeros(length), torch.zeros(length), torch.zeros(length)
        exp_avg, exp_avg_sq = exp_avg.to(moments), exp_avg_sq.to(moments)
        for step in range(1, 51):
            grad = torch.randn(length, generator=generator) + 0.5
            AdamW(config)(master, grad, exp_avg, exp_avg_sq, rate=0.01, step=step, decays=True)
        results.append(master)
    rounded, exact = results
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 2**-8


def test_a_mean_that_would_stand_still_is_refused() -> None:
    def refused(beta2: float, moments: str) -> list[str]:
        return [problem.field for problem in OptimizerConfig(beta2=beta2, moments=moments).problems()]

    assert refused(0.999, "auto") == refused(0.999, "bfloat16") == ["beta2"]
    assert refused(0.999, "float32") == refused(0.95, "bfloat16") == []
    assert refused(0.95, "int8") == ["moments"]
    # The refused case does happen: a second moment that falls by under half of its spacing per step never falls.
    stuck, falling = torch.ones(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.bfloat16)
    master, grad, exp_avg = torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    for step in range(1, 101):
        for beta2, exp_avg_sq in ((0.999, stuck), (0.99, falling)):
            rule = AdamW(OptimizerConfig(beta2=beta2))
            rule(master, grad, exp_avg, exp_avg_sq, rate=0.0, step=step, decays=False)
    assert stuck.item() == 1.0
    assert falling.item() < 0.5
