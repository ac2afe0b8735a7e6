"""SwiGLU: silu of the first half of a row times its second half, optionally times the row's gate weight.

Letters: R rows, F inner width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fp8_tensors import promote_to_fp32


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(first half) ⊙ second half of the last dimension."""
    out: Tensor = _SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call]
    return out


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """Reference of `swiglu`, differentiated by autograd, which also saves silu(first half)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def weighted_swiglu(gate_up_RF: Tensor, weights_R: Tensor) -> Tensor:
    """Return SwiGLU with each row multiplied by its weight, [R, 2F] to [R, F]."""
    out: Tensor = _WeightedSwiGLU.apply(gate_up_RF, weights_R)  # type: ignore[no-untyped-call]
    return out


def weighted_swiglu_reference(gate_up_RF: Tensor, weights_R: Tensor) -> Tensor:
    """Reference of `weighted_swiglu`, differentiated by autograd."""
    return (swiglu_reference(gate_up_RF) * weights_R[:, None]).to(gate_up_RF.dtype)


def swiglu_forward(gate_up_RF: Tensor, weights_R: Tensor | None) -> Tensor:
    """Return `weighted_swiglu` for the rows of experts, or `swiglu` for those of a dense layer, without weights."""
    return swiglu(gate_up_RF) if weights_R is None else weighted_swiglu(gate_up_RF, weights_R)


def swiglu_backward(gate_up_RF: Tensor, weights_R: Tensor | None, grad_RF: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of gate and up projections, and of the weights if given."""
    if weights_R is None:
        return _gradient(gate_up_RF, grad_RF), None
    return _weighted_gradients(gate_up_RF, weights_R, grad_RF)


def _scaled(x_RF: Tensor, weights_R: Tensor) -> Tensor:
    """Multiply each row by its weight in the wider of the two dtypes, and round once. May overwrite `x_RF`."""
    if x_RF.dtype == weights_R.dtype:
        return x_RF.mul_(weights_R[:, None])
    return (x_RF * weights_R[:, None]).to(x_RF.dtype)


class _SwiGLU(torch.autograd.Function):
    """SwiGLU that saves its input and no intermediate result."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _gradient(*ctx.saved_tensors, *grads)


def _gradient(gate_up: Tensor, grad: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    grad_gate_up = torch.empty_like(gate_up)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
    torch.mul(F.silu(gate), grad, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return grad_gate_up


class _WeightedSwiGLU(torch.autograd.Function):
    """Weighted SwiGLU whose backward writes both halves of its gradient in place: fewer passes than autograd's."""

    @staticmethod
    def forward(ctx: Any, gate_up_RF: Tensor, weights_R: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_RF, weights_R)
        gate_RF, up_RF = gate_up_RF.chunk(2, dim=-1)
        return _scaled(F.silu(gate_RF).mul_(up_RF), weights_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return _weighted_gradients(*ctx.saved_tensors, *grads)


def _weighted_gradients(gate_up_RF: Tensor, weights_R: Tensor, grad_RF: Tensor) -> tuple[Tensor, Tensor]:
    gate_RF, up_RF = gate_up_RF.chunk(2, dim=-1)
    grad_gate_up_RF = torch.empty_like(gate_up_RF)
    grad_gate_RF, grad_up_RF = grad_gate_up_RF.chunk(2, dim=-1)
    unweighted_RF = F.silu(gate_RF).mul_(grad_RF)
    grad_weights_R = torch.linalg.vecdot(promote_to_fp32(unweighted_RF), promote_to_fp32(up_RF)).to(weights_R.dtype)
    torch.mul(unweighted_RF, weights_R[:, None], out=grad_up_RF)
    weighted_RF = _scaled(grad_RF * up_RF, weights_R)
    torch.ops.aten.silu_backward.grad_input(weighted_RF, gate_RF, grad_input=grad_gate_RF)
    return grad_gate_up_RF, grad_weights_R
