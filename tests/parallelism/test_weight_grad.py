"""Delayed weight gradients: equal to autograd's, left where the forward left them, computed when flushed."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shoestring.parallelism.weight_grad import DelayedWeightGradients, embedding, get_active_collector, linear
from shoestring.trainer.model.experts import (
    accumulate_grouped_wgrad,
    grouped_linear,
    grouped_mm_reference,
    grouped_wgrad,
    grouped_wgrad_reference,
)
from shoestring.trainer.model.loss import linear_cross_entropy
from shoestring.trainer.model.split_backward import SplitBackward

ROWS = (3, 0, 5, 8)


def test_a_weight_has_no_gradient_until_the_work_is_run() -> None:
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(4, 2, 5, dtype=torch.float64)
    left = DelayedWeightGradients()
    with left.collect_from_forward():
        out = linear(x, weight)
    assert get_active_collector() is None
    out.backward(grad)
    assert weight.grad is None
    left.flush()
    left.flush()  # nothing is left: nothing is added twice
    expected = torch.autograd.grad(F.linear(x, weight), (x, weight), grad)
    torch.testing.assert_close(x.grad, expected[0])
    torch.testing.assert_close(weight.grad, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_add_up_in_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    weight = torch.randn(5, 3, requires_grad=True)
    expected = torch.zeros_like(weight)
    for _ in range(3):
        x, grad, left = torch.randn(4, 3).to(dtype), torch.randn(4, 5).to(dtype), DelayedWeightGradients()
        with left.collect_from_forward():
            linear(x, weight).backward(grad)
        left.flush()
        expected += (grad.T @ x).float()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad, expected)


def test_outside_of_a_collection_autograd_does_it_all() -> None:
    x, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(dim=0).expand(5, 3))


def test_deferred_work_waits_for_run_alone() -> None:
    done: list[str] = []
    for deferred in (False, True):
        left = DelayedWeightGradients(deferred=deferred)
        left.add_task(lambda: done.append("first"))
        left.add_task(lambda: done.append("second"))
        left.flush_unless_deferred()
        assert done == ([] if deferred else ["first", "second"])
        left.flush()
        assert done == ["first", "second"]
        done.clear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_grouped_products_are_those_of_each_expert(dtype: torch.dtype) -> None:
    x = torch.randn(sum(ROWS), 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(len(ROWS), 4, 8, dtype=dtype, requires_grad=True)
    grad = torch.randn(sum(ROWS), 4, dtype=dtype)
    left = DelayedWeightGradients()
    with left.collect_from_forward():
        out = grouped_linear(x, weight, ROWS)
    out.backward(grad)
    assert weight.grad is None
    left.flush()
    reference = grouped_mm_reference(x, weight, ROWS)
    expected = torch.autograd.grad(reference, (x, weight), grad)
    torch.testing.assert_close(out, reference)
    torch.testing.assert_close(x.grad, expected[0])
    torch.testing.assert_close(weight.grad, expected[1])
    outer = grouped_wgrad(grad, x.detach(), ROWS)
    torch.testing.assert_close(outer, grouped_wgrad_reference(grad, x.detach(), ROWS))
    assert not outer[1].any()  # an expert without rows


def test_products_of_experts_are_added_to_the_gradient_that_is_there() -> None:
    """No other tensor of its size is allocated; a gradient of a wider dtype takes the sum of the products."""
    weight = torch.randn(len(ROWS), 8, 8, requires_grad=True)
    grad, x = torch.randn(sum(ROWS), 8), torch.randn(sum(ROWS), 8)
    weight.grad = torch.randn_like(weight)
    expected = weight.grad + grouped_wgrad_reference(grad, x, ROWS)
    with patch("shoestring.trainer.model.experts.grouped_wgrad", side_effect=AssertionError("a whole gradient")):
        accumulate_grouped_wgrad(weight, grad, x, ROWS)
    torch.testing.assert_close(weight.grad, expected)
    accumulate_grouped_wgrad(weight, grad.bfloat16(), x.bfloat16(), ROWS)
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(weight.grad, expected + grouped_wgrad_reference(grad, x, ROWS), rtol=0, atol=0.1)


class _Largest(TorchDispatchMode):
    """Records the largest number of elements of a tensor that an operation creates."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves(args) if isinstance(tensor, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lowest", [0, 3], ids=["with token 0", "without"])
def test_rows_of_tokens_are_added_without_a_gradient_of_the_whole_table(dtype: torch.dtype, lowest: int) -> None:
    """The result equals, to the last bit, the sum over each token's rows, added as one."""
    wide = torch.promote_types(dtype, torch.float32)
    table = torch.zeros(1000, 4, dtype=dtype, requires_grad=True)
    table.grad_dtype = wide
    table.grad = torch.randn(1000, 4, dtype=wide)
    tokens, grad = torch.randint(lowest, lowest + 20, (3, 30)), torch.randn(3, 30, 4).to(dtype)
    dense = torch.ops.aten.embedding_dense_backward(grad.to(wide), tokens, 1000, -1, False)
    expected = table.grad + dense
    left = DelayedWeightGradients()
    SplitBackward(lambda: (embedding(tokens, table),)).backward_inputs(left, grad)
    with _Largest() as largest:  # type: ignore[no-untyped-call]
        left.flush()
    assert torch.equal(table.grad, expected)
    assert largest.elements == tokens.numel() * 4


def test_gradients_of_narrow_weights_are_summed_wide() -> None:
    """256 + 1 is 256 in BF16: a weight in BF16 has a gradient in FP32, also within one product of a micro-batch."""
    weights = [torch.zeros(rows, 4, dtype=torch.bfloat16, requires_grad=True) for rows in (4, 4, 4096)]
    for weight in weights:
        weight.grad_dtype = torch.float32
        weight.grad = torch.zeros(weight.shape)
    table, projection, head = weights
    left = DelayedWeightGradients()
    tokens = torch.tensor([0, 0, 1])
    grad = torch.tensor([256.0, 1.0, 3.0]).bfloat16()[:, None].expand(3, 4)
    SplitBackward(lambda: (embedding(tokens, table),)).backward_inputs(left, grad)
    for row in (256.0, 1.0):
        x = torch.full((1, 4), row, dtype=torch.bfloat16)
        SplitBackward(lambda x: (linear(x, projection),), x).backward_inputs(left, torch.ones_like(x))
    hidden = torch.ones(600, 4, dtype=torch.bfloat16)
    hidden[:256] *= 256  # of the first chunk
    targets = torch.zeros(600, dtype=torch.int64)
    loss = SplitBackward(lambda x: (linear_cross_entropy(x, head, targets),), hidden)
    loss.backward_inputs(left, torch.ones(()))
    left.flush()
    assert table.grad is not None
    assert projection.grad is not None
    assert head.grad is not None
    assert table.grad[:2, 0].tolist() == [257.0, 3.0]
    assert projection.grad[0, 0].item() == 257.0
    assert head.grad[0, 0].item() == -(256 * 256 + 344)  # of three chunks; the probability of 1 in 4096 is rounded away


def test_a_gradient_keeps_no_activation_alive() -> None:
    weight, left = torch.randn(3, 3, requires_grad=True), DelayedWeightGradients()
    for _ in range(2):
        SplitBackward(lambda x: (linear(x, weight),), torch.randn(2, 3)).backward_inputs(left, torch.ones(2, 3))
        left.flush_unless_deferred()
        assert weight.grad is not None
        assert not weight.grad.requires_grad
