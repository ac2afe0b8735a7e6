"""Cross-entropy over the vocabulary, a chunk of tokens at a time: never all logits of a micro-batch at once.

Letters: T tokens, D hidden, V vocabulary, C tokens of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...parallelism.pipeline.weight_grad import add_to_grad, collecting
from ..precision.linear import at_least_fp32

IGNORED = -100
"""Target of a token that counts in no loss."""

_CHUNK_ELEMENTS = 2**20  # logits of a chunk: 4 MB in FP32, which stay in a cache
_FEWEST_TOKENS = 256  # of a chunk, for products worth their launch


def linear_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(hidden weightᵀ)[target], in nats; FP32 at least, 0-dimensional.

    `weight_VD` may be wider than `hidden_TD`, whose dtype the products are taken in; softmax and sums FP32 at least.
    Gradients are formed together with the loss, while a chunk's logits are at hand, and scaled in the backward.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden_TD, weight_VD, targets_T, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return loss


def chunk_tokens(vocabulary: int) -> int:
    """C: tokens whose logits are in memory at once."""
    return max(_FEWEST_TOKENS, _CHUNK_ELEMENTS // vocabulary)


def linear_cross_entropy_twin(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """The same in one piece, differentiated by autograd."""
    logits_TV = at_least_fp32(F.linear(hidden_TD, weight_VD.to(hidden_TD.dtype)))
    return F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, grad_enabled: bool) -> Tensor:
        weight = weight_VD.to(hidden_TD.dtype)
        needs_grad = grad_enabled and any(ctx.needs_input_grad)  # which is not false under no_grad by itself
        loss = at_least_fp32(hidden_TD.new_zeros(()))
        grad_TD, grad_VD = torch.empty_like(hidden_TD), weight_VD
        if needs_grad:
            grad_VD = torch.zeros_like(weight_VD, dtype=weight_VD.grad_dtype)
        size = chunk_tokens(len(weight_VD))
        for start in range(0, len(hidden_TD), size):
            chunk = slice(start, start + size)
            probability_CV, chunk_loss = _softmax(F.linear(hidden_TD[chunk], weight), targets_T[chunk])
            loss += chunk_loss
            if needs_grad:
                grad_CV = _minus_target(probability_CV, targets_T[chunk]).to(weight.dtype)
                torch.mm(grad_CV, weight, out=grad_TD[chunk])
                _add_product(grad_VD, grad_CV, hidden_TD[chunk])
        if needs_grad:
            ctx.save_for_backward(grad_TD, grad_VD)
            ctx.weight, ctx.left = weight_VD, collecting()
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        grad_TD, grad_VD = ctx.saved_tensors
        (grad,) = grads
        grad_TD.mul_(grad.to(grad_TD.dtype))
        if ctx.left is None:
            return grad_TD, grad_VD.mul_(grad.to(grad_VD.dtype)), None, None
        ctx.left.add(lambda: add_to_grad(ctx.weight, grad_VD.mul_(grad.to(grad_VD.dtype))))
        return grad_TD, None, None, None


def _softmax(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities, FP32 at least, in the logits' storage where it is wide enough; and the sum of the losses."""
    logits_CV = at_least_fp32(logits_CV)
    counted_C = targets_C != IGNORED
    logits_CV -= logits_CV.amax(dim=1, keepdim=True)
    target_C = logits_CV.gather(1, targets_C.clamp(min=0)[:, None])[:, 0]
    probability_CV = logits_CV.exp_()
    total_C = probability_CV.sum(dim=1)
    loss = ((total_C.log() - target_C) * counted_C).sum()
    return probability_CV.mul_((counted_C / total_C)[:, None]), loss


def _minus_target(probability_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Gradient of the loss by the logits, in place: probability - 1 at the target, and 0 for ignored tokens."""
    counted_C1 = (targets_C != IGNORED).to(probability_CV.dtype)[:, None]
    return probability_CV.scatter_add_(1, targets_C.clamp(min=0)[:, None], -counted_C1)


def _add_product(total_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> None:
    if grad_CV.dtype == total_VD.dtype:
        total_VD.addmm_(grad_CV.T, hidden_CD)
    else:
        total_VD += grad_CV.T @ hidden_CD
