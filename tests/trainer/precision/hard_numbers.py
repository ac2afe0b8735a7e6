"""Numbers that are hard to quantize."""

import torch
from torch import Tensor


def numbers(rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return many magnitudes, zeros, a tile of zeros, ties, and the ends of FP32."""
    generator = torch.Generator().manual_seed(rows + width)
    x = torch.randn(rows, width, generator=generator) * 10 ** torch.empty(rows, width).uniform_(
        -6, 2, generator=generator
    )
    x[0, :128] = 0
    x[-1, -1] = 1e-42
    if rows > 2:
        x[1] = torch.linspace(-448, 448, width).round()  # an exact scale of 1, and so ties
        x[1, 0] = 448
        x[2] *= 1e34
    return x.to(dtype)
