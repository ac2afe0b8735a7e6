"""Feed-forward networks: one dense SwiGLU, and many of them computed as grouped GEMMs (report §2.1.2, eq. 12).

Letters: T tokens, D hidden, F inner width, R received rows, L experts on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..precision.linear import Linear, at_least_fp32


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) ⊙ W_up x)."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up = Linear(hidden, 2 * inner)
        self.down = Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        out: Tensor = self.down(swiglu(self.gate_up(x)))
        return out


class Experts(nn.Module):
    """The routed experts that live on one rank, as two stacked weights."""

    def __init__(self, local_experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up_LFD = nn.Parameter(torch.empty(local_experts, 2 * inner, hidden))
        self.down_LDF = nn.Parameter(torch.empty(local_experts, hidden, inner))

    def forward(self, rows_RD: Tensor, weights_R: Tensor, rows_per_expert_L: tuple[int, ...]) -> Tensor:
        """[R, D] to [R, D]; rows are grouped by expert. Each row comes out multiplied by its gate weight.

        The weight multiplies before the down projection, so that combine can be a plain sum.
        """
        gate_up_RF = grouped_mm(rows_RD, self.gate_up_LFD.to(rows_RD.dtype), rows_per_expert_L)
        inner_RF = weighted_swiglu(gate_up_RF, weights_R)
        return grouped_mm(inner_RF, self.down_LDF.to(rows_RD.dtype), rows_per_expert_L)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(first half) ⊙ second half of the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def weighted_swiglu(gate_up_RF: Tensor, weights_R: Tensor) -> Tensor:
    """SwiGLU with each row times its weight, [R, 2F] to [R, F]."""
    out: Tensor = _WeightedSwiGLU.apply(gate_up_RF, weights_R)  # type: ignore[no-untyped-call]
    return out


def weighted_swiglu_twin(gate_up_RF: Tensor, weights_R: Tensor) -> Tensor:
    """The same, differentiated by autograd."""
    return (swiglu(gate_up_RF) * weights_R[:, None]).to(gate_up_RF.dtype)


def _scaled(x_RF: Tensor, weights_R: Tensor) -> Tensor:
    """Each row times its weight, rounded once, from the wider of the two dtypes. May write into `x_RF`."""
    if x_RF.dtype == weights_R.dtype:
        return x_RF.mul_(weights_R[:, None])
    return (x_RF * weights_R[:, None]).to(x_RF.dtype)


class _WeightedSwiGLU(torch.autograd.Function):
    """Fewer passes over memory than autograd takes: the backward writes both halves of its gradient in place."""

    @staticmethod
    def forward(ctx: Any, gate_up_RF: Tensor, weights_R: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_RF, weights_R)
        gate_RF, up_RF = gate_up_RF.chunk(2, dim=-1)
        return _scaled(F.silu(gate_RF).mul_(up_RF), weights_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate_up_RF, weights_R = ctx.saved_tensors
        (grad_RF,) = grads
        gate_RF, up_RF = gate_up_RF.chunk(2, dim=-1)
        activated_RF = F.silu(gate_RF)
        unweighted_RF = grad_RF * activated_RF
        grad_weights_R = torch.linalg.vecdot(at_least_fp32(unweighted_RF), at_least_fp32(up_RF)).to(weights_R.dtype)
        grad_gate_up_RF = torch.empty_like(gate_up_RF)
        grad_gate_RF, grad_up_RF = grad_gate_up_RF.chunk(2, dim=-1)
        grad_up_RF.copy_(_scaled(unweighted_RF, weights_R))
        weighted_RF = _scaled(grad_RF * up_RF, weights_R)
        grad_gate_RF.copy_(torch.ops.aten.silu_backward(weighted_RF, gate_RF))
        return grad_gate_up_RF, grad_weights_R


def grouped_mm(x_RK: Tensor, weight_LNK: Tensor, rows_per_expert_L: tuple[int, ...]) -> Tensor:
    """Rows times the transposed weight of their expert, [R, N]; `rows_per_expert_L` sums to R."""
    if x_RK.dtype == torch.float64:
        return grouped_mm_twin(x_RK, weight_LNK, rows_per_expert_L)
    ends_L = torch.tensor(rows_per_expert_L, dtype=torch.int32, device=x_RK.device).cumsum(0, dtype=torch.int32)
    return F.grouped_mm(x_RK, weight_LNK.transpose(1, 2), offs=ends_L)


def grouped_mm_twin(x_RK: Tensor, weight_LNK: Tensor, rows_per_expert_L: tuple[int, ...]) -> Tensor:
    """The same, an expert at a time: the oracle, and the path for FP64, which `F.grouped_mm` lacks."""
    parts = x_RK.split(rows_per_expert_L)
    return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weight_LNK, strict=True)])
