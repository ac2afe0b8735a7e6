"""RMSNorm."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..costs.operation_memory import MicroBatchShape, OperationMemory, SavedActivation
from ..precision.fp8_tensors import promote_to_fp32
from .config import ModelConfig
from .recompute import RecomputeModule, run_recomputable


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension: x / sqrt(mean(x²) + eps) · weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize [..., width]; same shape and dtype, computed in FP32 or wider."""
        return run_recomputable(RecomputeModule.NORM, rms_norm, x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize the last dimension of `x`; the function of `RMSNorm`."""
    # A custom backward: a CPU runs torch's own as a dozen passes over x, forward and backward.
    out: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Reference of `rms_norm`, by torch's own function."""
    out: Tensor = F.rms_norm(promote_to_fp32(x), list(weight.shape), promote_to_fp32(weight), eps)
    return out.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm that saves its input and one number per row; the backward normalizes x again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = promote_to_fp32(x)
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse: Tensor = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        grad = promote_to_fp32(grads[0])
        normed = promote_to_fp32(x) * inverse
        product = grad * normed
        grad_weight = product.flatten(0, -2).sum(dim=0).to(weight.dtype)
        # d normed / d x removes the part of the gradient along normed, whose length is fixed.
        along = product.matmul(weight.to(product.dtype)).div_(x.shape[-1]).unsqueeze(-1)
        grad_x = (grad * weight).addcmul_(normed, along, value=-1).mul_(inverse)
        return grad_x.to(x.dtype), grad_weight, None


def norm_statistics(norms: int, batch: MicroBatchShape) -> SavedActivation:
    """Return what `norms` norms save besides their inputs: one number per token each."""
    return SavedActivation("one number per token of each norm", norms * batch.tokens * batch.fp32_element_bytes)


def final_norm_memory(config: ModelConfig, batch: MicroBatchShape) -> OperationMemory:
    """Return the memory of the norm after the last layer, with that layer's output."""
    kept = SavedActivation("input of the final norm", batch.hidden_state_bytes(config))
    return OperationMemory((kept, norm_statistics(1, batch)))
