"""Causal scaled-dot-product attention on CPUs; values may be narrower than queries and keys.

Letters: B batch, H heads, S sequence, Q queries of one block, P the positions up to its last, W width of queries and
keys, V of values.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision.fp8_tensors import promote_to_fp32

_BLOCK = 128  # queries per block, so that a block's scores stay in a cache
# Up to this length the forward saves the probabilities; beyond it their S × S is more than all other activations.
_KEPT_LENGTH = 512


def causal_attention(q_BHSW: Tensor, k_BHSW: Tensor, v_BHSV: Tensor, scale: float) -> Tensor:
    """Return softmax(scale · q kᵀ) v, [B, H, S, V], where a position attends to itself and those before it.

    Raises `RuntimeError` on any device but a CPU: `Model.set_attention` sets the backend of a GPU.
    """
    if q_BHSW.device.type != "cpu":
        raise RuntimeError(f"no attention backend is set for {q_BHSW.device}: call Model.set_attention first")
    out: Tensor = _BlockAttention.apply(q_BHSW, k_BHSW, v_BHSV, scale)  # type: ignore[no-untyped-call]
    return out


def causal_attention_reference(q_BHSW: Tensor, k_BHSW: Tensor, v_BHSV: Tensor, scale: float) -> Tensor:
    """Reference of `causal_attention`, by torch's own function."""
    return F.scaled_dot_product_attention(q_BHSW, k_BHSW, v_BHSV, is_causal=True, scale=scale)


def saved_probability_count(length: int) -> int:
    """Return the probabilities saved per head and sequence of this length, including the zeros within blocks."""
    if length > _KEPT_LENGTH:
        return 0
    return sum((queries.stop - queries.start) * seen.stop for queries, seen in _blocks(length))


class _BlockAttention(torch.autograd.Function):
    """Attention by plain products: one block of queries of one sequence at a time, with the keys that it attends to.

    It rounds as the fused GPU kernels do: scores, softmax and the gradient of scores are FP32 or wider, operands of
    products have the inputs' dtype.
    """

    # torch's fused CPU kernel requires values as wide as keys and is slower; `benchmarks/cpu_profile.py` prints the
    # share of both in a step.

    @staticmethod
    def forward(ctx: Any, q_BHSW: Tensor, k_BHSW: Tensor, v_BHSV: Tensor, scale: float) -> Tensor:
        keeps = any(ctx.needs_input_grad) and q_BHSW.shape[2] <= _KEPT_LENGTH
        kept = []
        out_BHSV = _empty_like(v_BHSV)
        later_QQ = _later(q_BHSW)
        for q_HSW, k_HSW, v_HSV, out_HSV in zip(q_BHSW, k_BHSW, v_BHSV, out_BHSV, strict=True):
            for queries, seen in _blocks(q_BHSW.shape[2]):
                probability_HQP = _probability(q_HSW[:, queries], k_HSW[:, seen], later_QQ, scale).to(v_HSV.dtype)
                torch.bmm(probability_HQP, v_HSV[:, seen], out=out_HSV[:, queries])
                if keeps:
                    kept.append(probability_HQP)
        ctx.save_for_backward(q_BHSW, k_BHSW, v_BHSV, *kept)
        ctx.scale = scale
        return out_BHSV

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_BHSW, k_BHSW, v_BHSV, *kept = ctx.saved_tensors
        grad_q, grad_k, grad_v = (_empty_like(x) for x in (q_BHSW, k_BHSW, v_BHSV))
        sequences = zip(q_BHSW, k_BHSW, v_BHSV, grads[0], grad_q, grad_k, grad_v, strict=True)
        blocks, later_QQ = list(_blocks(q_BHSW.shape[2])), _later(q_BHSW)
        for number, (q_HSW, k_HSW, v_HSV, grad_HSV, grad_q_HSW, grad_k_HSW, grad_v_HSV) in enumerate(sequences):
            own = kept[number * len(blocks) : (number + 1) * len(blocks)]
            # Last block first: it attends to all keys, so it writes every sum over queries that the others add to.
            for queries, seen in reversed(blocks):
                q_HQW, k_HPW, grad_HQV = q_HSW[:, queries], k_HSW[:, seen], grad_HSV[:, queries]
                probability_HQP = own.pop() if own else _probability(q_HQW, k_HPW, later_QQ, ctx.scale)
                begun = int(seen.stop < q_HSW.shape[1])
                grad_score_HQP = _grad_score(grad_HQV, v_HSV[:, seen], probability_HQP).to(q_HSW.dtype)
                grad_v_HSV[:, seen].baddbmm_(probability_HQP.to(v_HSV.dtype).transpose(1, 2), grad_HQV, beta=begun)
                grad_k_HSW[:, seen].baddbmm_(grad_score_HQP.transpose(1, 2), q_HQW, beta=begun, alpha=ctx.scale)
                grad_q_HSW[:, queries].baddbmm_(grad_score_HQP, k_HPW, beta=0, alpha=ctx.scale)
        return grad_q, grad_k, grad_v, None


def _blocks(length: int) -> Iterator[tuple[slice, slice]]:
    """Yield the queries of each block, and the positions that the last of them attends to."""
    for start in range(0, length, _BLOCK):
        stop = min(start + _BLOCK, length)
        yield slice(start, stop), slice(stop)


def _later(like: Tensor) -> Tensor:
    """Return the causal mask of a block: -inf where a key comes after its query, else 0; FP32 or wider."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return like.new_full((_BLOCK, _BLOCK), float("-inf"), dtype=dtype).triu(1)


def _probability(q_HQW: Tensor, k_HPW: Tensor, later_QQ: Tensor, scale: float) -> Tensor:
    """Return the softmax of a block's scores, whose queries are the last Q of the P positions; FP32 or wider."""
    score_HQP = torch.bmm(promote_to_fp32(q_HQW) * scale, promote_to_fp32(k_HPW).transpose(1, 2))
    queries, seen = score_HQP.shape[1:]
    score_HQP[..., seen - queries :] += later_QQ[:queries, :queries]
    return score_HQP.softmax(dim=-1)


def _grad_score(grad_HQV: Tensor, v_HPV: Tensor, probability_HQP: Tensor) -> Tensor:
    """Return the gradient of the scores; FP32 or wider."""
    grad_HQP = torch.bmm(promote_to_fp32(grad_HQV), promote_to_fp32(v_HPV).transpose(1, 2))
    return torch._softmax_backward_data(grad_HQP, promote_to_fp32(probability_HQP), -1, grad_HQP.dtype)


def _empty_like(x_BHSW: Tensor) -> Tensor:
    """Return an empty [B, H, S, any] in which the heads of a token are contiguous."""
    # That is the layout that the projections before and after attention write and read: no copy between them.
    batch, heads, length, width = x_BHSW.shape
    return x_BHSW.new_empty((batch, length, heads, width)).transpose(1, 2)
