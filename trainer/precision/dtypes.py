"""Dtypes of what is summed."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in FP32, or as it is where it is wider, so that FP64 runs stay FP64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
