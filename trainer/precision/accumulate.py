"""Sums of FP8 products: exact, and as Hopper's tensor cores form them (report §3.3.2; ISCA'25 paper §3.1.1).

Letters: X and Y rows of the two factors, K what is summed over, I the products of one instruction.
"""

from __future__ import annotations

import torch
from torch import Tensor

INSTRUCTION = 32
"""Products that one tensor-core instruction sums for each element."""

_FRACTION = 13  # bits behind the leading one that survive the alignment


def exact_sum(a_XK: Tensor, b_YK: Tensor) -> Tensor:
    """a bᵀ of E4M3 numbers given in FP64, rounded once to FP32, [X, Y].

    Up to K = 2^17 no sum in any order needs more than FP64's 53 bits: products are multiples of 2^-18 and at most 2^18.
    So the bits do not depend on the order in which a library sums.
    """
    return (a_XK @ b_YK.T).to(torch.float32)


def hopper_sum(a_XK: Tensor, b_YK: Tensor, promote_every: int | None = None) -> Tensor:
    """The same sum in the tensor cores' accumulator: FP32 in name, with 13 bits behind the leading one.

    Each instruction adds 32 products to its accumulator: all 33 terms are aligned to the largest exponent among them
    and what lies below 13 fraction bits is cut off, before the sum and after it. With `promote_every` elements the
    accumulator is added to a true FP32 register and begins again at 0.
    """
    total_XY = torch.zeros((len(a_XK), len(b_YK)), dtype=torch.float32, device=a_XK.device)
    held_XY = total_XY.double()
    for start in range(0, a_XK.shape[1], INSTRUCTION):
        part = slice(start, start + INSTRUCTION)
        products_XYI = a_XK[:, None, part] * b_YK[None, :, part]
        terms_XYI = torch.cat((products_XYI, held_XY[..., None]), dim=-1)
        step_XY = _step(terms_XYI.abs().amax(dim=-1))
        held_XY = _cut(terms_XYI, step_XY[..., None]).sum(dim=-1)
        held_XY = _cut(held_XY, _step(held_XY.abs()))
        if promote_every is not None and (start + INSTRUCTION) % promote_every == 0:
            total_XY += held_XY.to(torch.float32)
            held_XY = torch.zeros_like(held_XY)
    return total_XY + held_XY.to(torch.float32)


def _step(largest: Tensor) -> Tensor:
    """The last place that is kept of a number of this magnitude, and of all that are aligned with it."""
    _, exponent = torch.frexp(largest)
    return torch.ldexp(torch.ones_like(largest), exponent - 1 - _FRACTION)


def _cut(x: Tensor, step: Tensor) -> Tensor:
    return (x / step).trunc().mul_(step)
