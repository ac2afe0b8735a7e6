"""FP8 GEMMs by cuBLASLt through `torch.nn.functional.scaled_mm`. Not yet run on hardware.

It supports block scales on compute capability 9.0 from CUDA 12.9 on. Required layouts, from torch's ScaledBlas.cpp: the
first operand [M, K] row-major, with scales [M, K/128] column-major; the second [K, N] column-major, with scales of
tiles [N, K/128], or of blocks [K/128, N/128] padded to multiples of four, column-major too. So sides are zero-padded: K
to 512, M and N to 16.

Letters: M, N, K sides of a product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType
from typing_extensions import override

from ...comm.fp8 import TILE_WIDTH, tiles_per_row
from ...comm.units import round_up
from .backend import PrecisionBackend
from .fp8_tensors import Fp8Weight, RowwiseFp8Tensor, gemm_output_dtype, zero_pad

_SIDE, _TILES = 16, 4


class TorchBackend(PrecisionBackend):
    """FP8 backend by cuBLASLt."""

    @override
    def product(self, a: RowwiseFp8Tensor, b: RowwiseFp8Tensor | Fp8Weight, dtype: torch.dtype) -> Tensor:
        b_NK = b.values_NK if isinstance(b, Fp8Weight) else b.values_XD
        rows, columns = len(a.values_XD), len(b_NK)
        if not a.values_XD.numel():
            return a.scales_XQ.new_zeros((rows, columns), dtype=dtype)
        filled_MK = _filled(a.values_XD)
        if isinstance(b, Fp8Weight):
            format_of_b = ScalingType.BlockWise128x128
            scales_of_b = _filled_scales(b.scales_PQ, tiles_per_row(round_up(columns, _SIDE))).T
        else:
            format_of_b = ScalingType.BlockWise1x128
            scales_of_b = _filled_scales(b.scales_XQ, round_up(columns, _SIDE)).T.contiguous().T
        out = F.scaled_mm(
            filled_MK,
            _filled(b_NK).T,
            _filled_scales(a.scales_XQ, len(filled_MK)).T.contiguous().T,
            ScalingType.BlockWise1x128,
            scales_of_b,
            format_of_b,
            output_dtype=gemm_output_dtype(dtype),
        )
        return out[:rows, :columns].to(dtype)


def _filled(values: Tensor) -> Tensor:
    """Zero-pad both sides of [M, K]."""
    return zero_pad(values, round_up(values.shape[0], _SIDE), round_up(values.shape[1], _TILES * TILE_WIDTH))


def _filled_scales(scales: Tensor, rows: int) -> Tensor:
    return zero_pad(scales, rows, round_up(scales.shape[1], _TILES))
