"""FP8 GEMMs by cuBLASLt through `torch.nn.functional.scaled_mm`. Not yet run on hardware.

It supports block scales on compute capability 9.0 from CUDA 12.9 on. Required layouts, from torch's ScaledBlas.cpp: the
first operand [M, K] row-major, with scales [M, K/128] column-major; the second [K, N] column-major, with scales of
tiles [N, K/128], or of blocks [K/128, N/128] padded to multiples of four, column-major too. So sides are zero-padded: K
to 512, M and N to 16.

Letters: M, N, K sides of a product, Q tiles of a row; L experts on this rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from ...comm.fp8 import TILE_WIDTH, tiles_per_row
from ...comm.units import round_up
from .fp8_tensors import (
    ColumnwiseFp8Tensor,
    Fp8Weight,
    RowwiseFp8Tensor,
    gemm_output_dtype,
    zero_pad,
)
from .reference import ReferenceBackend, split_by_expert

_SIDE, _TILES = 16, 4


class TorchBackend(ReferenceBackend):
    """FP8 backend by cuBLASLt. It quantizes as the reference does, and multiplies one expert at a time."""

    def gemm(self, x: RowwiseFp8Tensor, weight: Fp8Weight, dtype: torch.dtype) -> Tensor:
        """Implement `PrecisionBackend`."""
        rows, columns = len(x.values_XD), len(weight.values_NK)
        if not rows:
            return x.scales_XQ.new_empty((0, columns), dtype=dtype)
        blocks_down = tiles_per_row(round_up(columns, _SIDE))
        second = _filled(weight.values_NK), _filled_scales(weight.scales_PQ, blocks_down)
        return _multiply(x, second, ScalingType.BlockWise128x128, gemm_output_dtype(dtype))[:rows, :columns].to(dtype)

    def grouped_wgrad_gemm(self, grad: ColumnwiseFp8Tensor, x: ColumnwiseFp8Tensor) -> Tensor:
        """Implement `PrecisionBackend`."""
        rows, columns = len(grad.tiles.values_XD), len(x.tiles.values_XD)
        products = []
        for ours, theirs in zip(split_by_expert(grad), split_by_expert(x), strict=True):
            if not ours.values_XD.shape[1]:
                products.append(ours.scales_XQ.new_zeros((rows, columns)))
                continue
            second = _filled(theirs.values_XD), _filled_scales(theirs.scales_XQ, round_up(columns, _SIDE))
            product = _multiply(ours, second, ScalingType.BlockWise1x128, torch.float32)
            products.append(product[:rows, :columns])
        return torch.stack(products)


def _multiply(a: RowwiseFp8Tensor, b: tuple[Tensor, Tensor], of_b: ScalingType, dtype: torch.dtype) -> Tensor:
    """Return a bᵀ with padded sides; `b` is [N, K] with its scales."""
    a_MK = _filled(a.values_XD)
    scales_MQ, (b_NK, b_scales) = _filled_scales(a.scales_XQ, len(a_MK)), b
    return F.scaled_mm(
        a_MK,
        b_NK.T,
        scales_MQ.T.contiguous().T,
        ScalingType.BlockWise1x128,
        b_scales.T if of_b == ScalingType.BlockWise128x128 else b_scales.T.contiguous().T,
        of_b,
        output_dtype=dtype,
    )


def _filled(values: Tensor) -> Tensor:
    """Zero-pad both sides of [M, K]."""
    return zero_pad(values, round_up(values.shape[0], _SIDE), round_up(values.shape[1], _TILES * TILE_WIDTH))


def _filled_scales(scales: Tensor, rows: int) -> Tensor:
    return zero_pad(scales, rows, round_up(scales.shape[1], _TILES))
