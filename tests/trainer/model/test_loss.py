"""The fused cross-entropy against its reference."""

import pytest
import torch
from torch import Tensor

from shoestring.parallelism.weight_grad import DelayedWeightGradients
from shoestring.tests.trainer.model.against_reference import gradients, random
from shoestring.trainer.model.loss import IGNORE_INDEX, linear_cross_entropy, linear_cross_entropy_reference


@pytest.mark.parametrize("tokens", [7, 700], ids=["one chunk", "several chunks"])
def test_linear_cross_entropy(tokens: int) -> None:
    hidden_TD, weight_VD = random(tokens, 6), random(4096, 6)
    targets_T = torch.randint(0, 4096, (tokens,), generator=torch.Generator().manual_seed(0))
    targets_T[::3] = IGNORE_INDEX
    pairs = (
        gradients(lambda h, w, f=f: f(h, w, targets_T), hidden_TD, weight_VD)
        for f in (linear_cross_entropy, linear_cross_entropy_reference)
    )
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_a_loss_without_a_counted_target_is_zero() -> None:
    loss, *grads = gradients(
        lambda h, w: linear_cross_entropy(h, w, torch.full((4,), IGNORE_INDEX)), random(4, 6), random(16, 6)
    )
    assert loss.item() == 0
    assert all(torch.count_nonzero(grad) == 0 for grad in grads)


def test_logits_too_large_for_exp_do_not_overflow() -> None:
    hidden_TD, weight_VD = 1000 * random(4, 6), random(16, 6)
    loss, *grads = gradients(lambda h, w: linear_cross_entropy(h, w, torch.arange(4)), hidden_TD, weight_VD)
    assert all(torch.isfinite(value).all() for value in (loss, *grads))


def test_the_head_keeps_its_input_alone() -> None:
    """Nothing of the logits' size is kept for the backward."""
    hidden, head = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    targets, left, kept = torch.randint(9, (6,)), DelayedWeightGradients(), list[Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with left.collect_from_forward(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = linear_cross_entropy(hidden, head, targets, loss_scale=0.5)
    assert [tensor.shape for tensor in kept] == [hidden.shape]
    loss.backward()
    left.flush()
    expected = torch.autograd.grad(
        linear_cross_entropy_reference(hidden, head, targets), (hidden, head), torch.tensor(0.5)
    )
    torch.testing.assert_close(hidden.grad, expected[0])
    torch.testing.assert_close(head.grad, expected[1])
