"""FP8 weights with a scale per block of 128 × 128, as the released checkpoint stores them (report §3.3.2).

Letters: N rows, K columns, I and J their blocks of 128, the last of which may be smaller.
"""

import torch
from torch import Tensor

from ...comm.fp8 import TILE_WIDTH, tiles_per_row
from ..precision.fp8_tensors import Fp8Weight, ScaleFormat
from ..precision.fp8_tensors import dequantize_weight as dequantize
from ..precision.fp8_tensors import quantize_weight as quantize

BLOCK_SIZE = TILE_WIDTH


def quantize_fp8_weight(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return float8_e4m3fn [N, K] and `weight_scale_inv`, FP32 [I, J]: weight = values · scale of the block.

    An element x of a block with largest magnitude a has an error of at most max(|x| / 16, a / 448 / 1024): half a unit
    in the last place, above and below the smallest normal number. Raises `ValueError` for weights that are not finite.
    """
    if not torch.isfinite(weight_NK).all():
        raise ValueError("holds infinity or NaN, which FP8 cannot keep apart from a large number")
    blocks = quantize(weight_NK, ScaleFormat.FP32)
    return blocks.values_NK, blocks.scales_PQ


def dequantize_fp8_weight(values_NK: Tensor, scale_IJ: Tensor) -> Tensor:
    """Return FP32 [N, K]. Raises `ValueError` unless there is one scale per block."""
    rows, columns = values_NK.shape
    if scale_IJ.shape != scale_shape((rows, columns)):
        raise ValueError(f"{list(values_NK.shape)} values have {list(scale_IJ.shape)} scales")
    return dequantize(Fp8Weight(values_NK, scale_IJ.to(torch.float32)), torch.float32)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return [I, J] of a matrix of this shape."""
    rows, columns = shape
    return tiles_per_row(rows), tiles_per_row(columns)
