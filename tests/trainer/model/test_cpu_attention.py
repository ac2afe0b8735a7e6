"""Causal attention against its reference, and sums in BF16."""

import pytest
import torch

from shoestring.tests.trainer.model.against_reference import gradients, random
from shoestring.trainer.model.cpu_attention import causal_attention, causal_attention_reference
from shoestring.trainer.model.loss import linear_cross_entropy, linear_cross_entropy_reference


@pytest.mark.parametrize("length", [7, 200, 520], ids=["one block", "blocks", "probabilities formed again"])
def test_causal_attention(length: int) -> None:
    q, k, v = random(2, 3, length, 6), random(2, 3, length, 6).flip(-1), random(2, 3, length, 4)
    pairs = (gradients(lambda *x, f=f: f(*x, 0.3), q, k, v) for f in (causal_attention, causal_attention_reference))
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_causal_attention_in_bf16_keeps_scores_in_fp32() -> None:
    """Scores of about 30, which BF16 would round by 0.1: BF16 products alone are off by less than 1 %."""
    q, k, v = (random(1, 2, 200, width, dtype=torch.bfloat16) for width in (48, 48, 32))
    k = k.flip(-1)
    ours = gradients(lambda q, k, v: causal_attention(q, k, v, 1.0), q, k, v)
    exact = gradients(lambda q, k, v: causal_attention_reference(q, k, v, 1.0), q.double(), k.double(), v.double())
    for value, reference in zip(ours, exact, strict=True):
        assert value.dtype == torch.bfloat16
        assert (value.double() - reference).norm() <= 1e-2 * reference.norm()


def test_in_bf16_sums_are_fp32_and_weights_keep_their_dtype() -> None:
    hidden_TD, weight_VD = random(700, 16, dtype=torch.bfloat16), random(512, 16, dtype=torch.float32)
    targets_T = torch.randint(0, 512, (700,), generator=torch.Generator().manual_seed(0))
    loss, grad_TD, grad_VD = gradients(lambda h, w: linear_cross_entropy(h, w, targets_T), hidden_TD, weight_VD)
    exact = gradients(
        lambda h, w: linear_cross_entropy_reference(h, w, targets_T), hidden_TD.double(), weight_VD.bfloat16().double()
    )
    assert (loss.dtype, grad_TD.dtype, grad_VD.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    for ours, theirs, tolerance in zip((loss, grad_TD, grad_VD), exact, (1e-3, 1e-2, 1e-2), strict=True):
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()
