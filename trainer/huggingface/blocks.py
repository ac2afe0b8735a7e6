"""FP8 weights with a scale for each block of 128 × 128, as the released checkpoint stores them (report §3.3.2).

Letters: N rows, K columns, I and J their blocks, 128 each but for the last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
_LARGEST = 448.0  # of E4M3
_SMALLEST_SCALE = 2.0**-126


def quantise_blocks(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [N, K], and `weight_scale_inv`, FP32 [I, J]: weight = values · scale of their block.

    An element x of a block with largest magnitude a comes back within max(|x| / 16, a / 448 / 1024): half a unit of the
    last place, above and below the smallest normal number. Raises `ValueError` for weights that are not finite.
    """
    if not torch.isfinite(weight_NK).all():
        raise ValueError("holds infinity or NaN, which FP8 cannot keep apart from a large number")
    blocks_IBJC = _blocks(weight_NK.to(torch.float32))
    scale_IJ = (blocks_IBJC.abs().amax(dim=(1, 3)) / _LARGEST).clamp(min=_SMALLEST_SCALE)
    scaled_IBJC = blocks_IBJC / scale_IJ[:, None, :, None]
    rows, columns = weight_NK.shape
    values_NK = scaled_IBJC.flatten(2).flatten(0, 1)[:rows, :columns].to(torch.float8_e4m3fn)
    return values_NK.contiguous(), scale_IJ


def dequantise_blocks(values_NK: Tensor, scale_IJ: Tensor) -> Tensor:
    """FP32 [N, K]. Raises `ValueError` where there is not one scale for each block."""
    blocks_IBJC = _blocks(values_NK.to(torch.float32))
    if scale_IJ.shape != (blocks_IBJC.shape[0], blocks_IBJC.shape[2]):
        raise ValueError(f"{list(values_NK.shape)} values have {list(scale_IJ.shape)} scales")
    rows, columns = values_NK.shape
    scaled_IBJC = blocks_IBJC * scale_IJ.to(torch.float32)[:, None, :, None]
    return scaled_IBJC.flatten(2).flatten(0, 1)[:rows, :columns].contiguous()


def scales_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """I and J of a matrix of this shape."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def _blocks(x_NK: Tensor) -> Tensor:
    """[I, 128, J, 128], zeros behind a last block that is not whole."""
    rows, columns = x_NK.shape
    x_NK = F.pad(x_NK, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks: Tensor = x_NK.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    return blocks
