"""Cross-entropy over the vocabulary, computed in chunks of tokens, so that only one chunk's logits are in memory.

Letters: T tokens, D hidden, V vocabulary, C tokens of one chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...parallelism.weight_grad import accumulate_linear_wgrad, get_active_collector
from ..costs.operation_memory import MicroBatchShape, OperationMemory, SavedActivation
from ..precision.fp8_tensors import promote_to_fp32
from .config import ModelConfig

IGNORE_INDEX = -100
"""Target of a token that is left out of the loss."""

_CHUNK_ELEMENTS = 2**20  # logits per chunk: 4 MB in FP32, which stay in a CPU's cache
# 512 MB in FP32. Larger chunks are better on a GPU: each one reads and writes the weight gradient, V × D, once.
_CHUNK_ELEMENTS_ON_GPU = 2**27
_FEWEST_TOKENS = 256  # per chunk: smaller GEMMs are not worth their launch


def linear_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, loss_scale: float = 1.0) -> Tensor:
    """Return the sum over tokens of -log softmax(hidden weightᵀ)[target], in nats; FP32 or wider, 0-dimensional.

    Gradients are those of `loss_scale` times the sum. Products have the dtype of `hidden_TD`, which `weight_VD` may
    exceed; softmax and sums are FP32 or wider. Inside a phase the weight's gradient is added to its `.grad` in the
    forward, and the backward must begin with a gradient of 1.
    """
    # Gradients are computed in the forward, while a chunk's logits are in memory: a backward would recompute them, or
    # save all T × V of them. Nothing of the weight's size is saved either.
    loss: Tensor = _LinearCrossEntropy.apply(hidden_TD, weight_VD, targets_T, loss_scale, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return loss


def tokens_per_logit_block(vocabulary: int, *, on_gpu: bool) -> int:
    """Return C, the tokens per chunk, whose logits are in memory together."""
    return max(_FEWEST_TOKENS, (_CHUNK_ELEMENTS_ON_GPU if on_gpu else _CHUNK_ELEMENTS) // vocabulary)


def linear_cross_entropy_reference(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Reference of `linear_cross_entropy`: all tokens in one product, differentiated by autograd."""
    logits_TV = promote_to_fp32(F.linear(hidden_TD, weight_VD.to(hidden_TD.dtype)))
    return F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORE_INDEX, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, factor: float, grad_enabled: bool
    ) -> Tensor:
        weight = weight_VD.to(hidden_TD.dtype)
        needs_grad = grad_enabled and any(ctx.needs_input_grad)  # `needs_input_grad` is true under no_grad, too
        loss = promote_to_fp32(hidden_TD.new_zeros(()))
        grad_TD = torch.empty_like(hidden_TD) if needs_grad else hidden_TD
        summed = weight_VD  # the products are added to its `.grad`
        if needs_grad and get_active_collector() is None:
            summed = weight_VD.detach()
            summed.grad_dtype = weight_VD.grad_dtype
        size = tokens_per_logit_block(len(weight_VD), on_gpu=hidden_TD.is_cuda)
        for start in range(0, len(hidden_TD), size):
            chunk = slice(start, start + size)
            probability_CV, chunk_loss = _softmax(F.linear(hidden_TD[chunk], weight), targets_T[chunk])
            loss += chunk_loss
            if needs_grad:
                grad_CV = _minus_target(probability_CV, targets_T[chunk]).mul_(factor).to(weight.dtype)
                torch.mm(grad_CV, weight, out=grad_TD[chunk])
                accumulate_linear_wgrad(summed, grad_CV, hidden_TD[chunk])
        if needs_grad:
            ctx.save_for_backward(grad_TD, None if summed is weight_VD else summed.grad)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        grad_TD, grad_VD = ctx.saved_tensors
        if grad_VD is None:
            return grad_TD, None, None, None, None
        (grad,) = grads
        return grad_TD.mul_(grad.to(grad_TD.dtype)), grad_VD.mul_(grad.to(grad_VD.dtype)), None, None, None


def _softmax(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities, FP32 or wider, and the sum of the losses; overwrites logits that are FP32 or wider."""
    logits_CV = promote_to_fp32(logits_CV)
    counted_C = targets_C != IGNORE_INDEX
    logits_CV -= logits_CV.amax(dim=1, keepdim=True)
    target_C = logits_CV.gather(1, targets_C.clamp(min=0)[:, None])[:, 0]
    probability_CV = logits_CV.exp_()
    total_C = probability_CV.sum(dim=1)
    loss = ((total_C.log() - target_C) * counted_C).sum()
    return probability_CV.mul_((counted_C / total_C)[:, None]), loss


def _minus_target(probability_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Return the loss's gradient by the logits, in place: probability - 1 at the target, 0 for ignored tokens."""
    counted_C1 = (targets_C != IGNORE_INDEX).to(probability_CV.dtype)[:, None]
    return probability_CV.scatter_add_(1, targets_C.clamp(min=0)[:, None], -counted_C1)


def loss_memory(config: ModelConfig, batch: MicroBatchShape) -> OperationMemory:
    """Return the memory of one `linear_cross_entropy`, whose forward adds the head's weight gradient to `.grad`."""
    chunk = min(batch.tokens, tokens_per_logit_block(config.vocab_size, on_gpu=not batch.on_cpu))
    # A chunk's logits exist in FP32 or wider and in the compute dtype, next to its part of the weight gradient.
    logits = chunk * config.vocab_size * (batch.fp32_element_bytes + batch.element_bytes * batch.is_narrow)
    return OperationMemory(
        (SavedActivation("gradient of the head's input", batch.hidden_state_bytes(config)),),
        forward_workspace=logits + config.vocab_size * config.hidden_size * batch.gradient_copy_bytes,
    )
