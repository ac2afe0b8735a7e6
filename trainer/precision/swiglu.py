"""SwiGLU: silu of the first half of a row times its second half, optionally times the row's gate weight.

Letters: R rows, F inner width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fp8_tensors import promote_to_fp32


def swiglu(gate_up: Tensor, weights_R: Tensor | None = None) -> Tensor:
    """Return silu(first half) ⊙ second half of the last dimension; of [R, 2F] with weights, times the row's weight."""
    out: Tensor = _SwiGLU.apply(gate_up, weights_R)  # type: ignore[no-untyped-call]
    return out


def swiglu_reference(gate_up: Tensor, weights_R: Tensor | None = None) -> Tensor:
    """Reference of `swiglu`, differentiated by autograd, which also saves silu(first half)."""
    gate, up = gate_up.chunk(2, dim=-1)
    out = F.silu(gate) * up
    return out if weights_R is None else (out * weights_R[:, None]).to(gate_up.dtype)


class _SwiGLU(torch.autograd.Function):
    """SwiGLU that saves its inputs and no intermediate result."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights_R: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up, weights_R)
        gate, up = gate_up.chunk(2, dim=-1)
        out = F.silu(gate).mul_(up)
        return out if weights_R is None else _scaled(out, weights_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        return swiglu_backward(*ctx.saved_tensors, *grads)


def swiglu_backward(gate_up: Tensor, weights_R: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of gate and up projections, and of the weights if given."""
    # Both halves of the gradient are written in place: fewer passes than autograd's.
    gate, up = gate_up.chunk(2, dim=-1)
    grad_gate_up = torch.empty_like(gate_up)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
    if weights_R is None:
        torch.mul(F.silu(gate), grad, out=grad_up)
        grad_silu, grad_weights_R = grad * up, None
    else:
        unweighted_RF = F.silu(gate).mul_(grad)
        grad_weights_R = torch.linalg.vecdot(promote_to_fp32(unweighted_RF), promote_to_fp32(up)).to(weights_R.dtype)
        torch.mul(unweighted_RF, weights_R[:, None], out=grad_up)
        grad_silu = _scaled(grad * up, weights_R)
    torch.ops.aten.silu_backward.grad_input(grad_silu, gate, grad_input=grad_gate)
    return grad_gate_up, grad_weights_R


def _scaled(x_RF: Tensor, weights_R: Tensor) -> Tensor:
    """Multiply each row by its weight in the wider of the two dtypes, and round once. May overwrite `x_RF`."""
    if x_RF.dtype == weights_R.dtype:
        return x_RF.mul_(weights_R[:, None])
    return (x_RF * weights_R[:, None]).to(x_RF.dtype)
