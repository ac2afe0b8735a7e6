"""Hand-written forward and backward against their plain twins: values and gradients, and gradcheck in FP64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shoestring.trainer.model.causal import causal_attention, causal_attention_twin
from shoestring.trainer.model.loss import IGNORED, linear_cross_entropy, linear_cross_entropy_twin
from shoestring.trainer.model.norm import rms_norm, rms_norm_twin
from shoestring.trainer.precision.swiglu import swiglu, swiglu_twin, weighted_swiglu, weighted_swiglu_twin


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_rms_norm() -> None:
    x, weight = random(3, 5, 8), random(8)
    for ours, theirs in zip(
        gradients(lambda a, b: rms_norm(a, b, 1e-6), x, weight),
        gradients(lambda a, b: rms_norm_twin(a, b, 1e-6), x, weight),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_swiglu_is_its_twin_to_the_last_bit(dtype: torch.dtype) -> None:
    gate_up = random(3, 5, 12, dtype=dtype)
    pairs = zip(gradients(swiglu, gate_up), gradients(swiglu_twin, gate_up), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_weighted_swiglu() -> None:
    for rows in (6, 0):
        gate_up_RF, weights_R = random(rows, 10), random(rows)
        pairs = (gradients(f, gate_up_RF, weights_R) for f in (weighted_swiglu, weighted_swiglu_twin))
        for ours, theirs in zip(*pairs, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("length", [7, 200, 520], ids=["one block", "blocks", "probabilities formed again"])
def test_causal_attention(length: int) -> None:
    q, k, v = random(2, 3, length, 6), random(2, 3, length, 6).flip(-1), random(2, 3, length, 4)
    pairs = (gradients(lambda *x, f=f: f(*x, 0.3), q, k, v) for f in (causal_attention, causal_attention_twin))
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_causal_attention_in_bf16_keeps_scores_in_fp32() -> None:
    """Scores of about 30, which BF16 would round by 0.1: its products alone cost less than 1 %."""
    q, k, v = (random(1, 2, 200, width, dtype=torch.bfloat16) for width in (48, 48, 32))
    k = k.flip(-1)
    ours = gradients(lambda q, k, v: causal_attention(q, k, v, 1.0), q, k, v)
    exact = gradients(lambda q, k, v: causal_attention_twin(q, k, v, 1.0), q.double(), k.double(), v.double())
    for value, reference in zip(ours, exact, strict=True):
        assert value.dtype == torch.bfloat16
        assert (value.double() - reference).norm() <= 1e-2 * reference.norm()


@pytest.mark.parametrize("tokens", [7, 700], ids=["one chunk", "several chunks"])
def test_linear_cross_entropy(tokens: int) -> None:
    hidden_TD, weight_VD = random(tokens, 6), random(4096, 6)
    targets_T = torch.randint(0, 4096, (tokens,), generator=torch.Generator().manual_seed(0))
    targets_T[::3] = IGNORED
    pairs = (
        gradients(lambda h, w, f=f: f(h, w, targets_T), hidden_TD, weight_VD)
        for f in (linear_cross_entropy, linear_cross_entropy_twin)
    )
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_a_loss_without_a_counted_target_is_zero() -> None:
    loss, *grads = gradients(
        lambda h, w: linear_cross_entropy(h, w, torch.full((4,), IGNORED)), random(4, 6), random(16, 6)
    )
    assert loss.item() == 0
    assert all(torch.count_nonzero(grad) == 0 for grad in grads)


def test_logits_too_large_for_exp_do_not_overflow() -> None:
    hidden_TD, weight_VD = 1000 * random(4, 6), random(16, 6)
    loss, *grads = gradients(lambda h, w: linear_cross_entropy(h, w, torch.arange(4)), hidden_TD, weight_VD)
    assert all(torch.isfinite(value).all() for value in (loss, *grads))


def test_in_bf16_sums_are_fp32_and_weights_keep_their_dtype() -> None:
    hidden_TD, weight_VD = random(700, 16, dtype=torch.bfloat16), random(512, 16, dtype=torch.float32)
    targets_T = torch.randint(0, 512, (700,), generator=torch.Generator().manual_seed(0))
    loss, grad_TD, grad_VD = gradients(lambda h, w: linear_cross_entropy(h, w, targets_T), hidden_TD, weight_VD)
    exact = gradients(
        lambda h, w: linear_cross_entropy_twin(h, w, targets_T), hidden_TD.double(), weight_VD.bfloat16().double()
    )
    assert (loss.dtype, grad_TD.dtype, grad_VD.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    for ours, theirs, tolerance in zip((loss, grad_TD, grad_VD), exact, (1e-3, 1e-2, 1e-2), strict=True):
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()
