"""The fused cross-entropy against its twin."""

from __future__ import annotations

import pytest
import torch

from shoestring.tests.trainer.model.against_twins import gradients, random
from shoestring.trainer.model.loss import IGNORED, linear_cross_entropy, linear_cross_entropy_twin


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
