"""A compute phase passes on the weight gradients of its backward."""

import torch
from torch import Tensor

from shoestring.parallelism.weight_grad import DelayedWeightGradients, embedding, linear
from shoestring.trainer.model.split_backward import SplitBackward


def test_a_phase_without_inputs_is_all_weights() -> None:
    table = torch.randn(5, 3, requires_grad=True)
    phase = SplitBackward(lambda: (embedding(torch.tensor([1, 1, 4]), table),))
    left = DelayedWeightGradients()
    assert phase.backward_inputs(left, torch.ones(3, 3)) == ()
    assert table.grad is None
    left.flush()
    assert _rows_with_gradient(table) == [1, 4]


def test_phases_pass_their_work_on_in_order() -> None:
    weights = [torch.randn(3, 3, requires_grad=True) for _ in range(2)]
    left = DelayedWeightGradients(deferred=True)
    for weight in weights:
        phase = SplitBackward(lambda x, weight=weight: (linear(x, weight),), torch.randn(2, 3))
        phase.backward_inputs(left, torch.ones(2, 3))
    assert all(weight.grad is None for weight in weights)
    left.flush()
    assert all(weight.grad is not None for weight in weights)


def _rows_with_gradient(table: Tensor) -> list[int]:
    assert table.grad is not None
    return table.grad.any(dim=1).nonzero().flatten().tolist()
