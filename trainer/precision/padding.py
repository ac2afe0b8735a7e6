"""Zeros behind the last row and column, for libraries that want whole multiples."""

from __future__ import annotations

import torch
from torch import Tensor


def rounded_up(size: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step


def padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns], row by row, with `x` in its upper left corner."""
    if x.shape == (rows, columns):
        return x.contiguous()
    whole = torch.zeros((rows, columns), dtype=x.dtype, device=x.device)
    whole[: x.shape[0], : x.shape[1]] = x
    return whole


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """What a product is written in on its way to `dtype`: BF16 as it is, else FP32."""
    return dtype if dtype == torch.bfloat16 else torch.float32
