"""FP8 GEMMs by Transformer Engine's block-scaled GEMM. Not yet run on hardware; written for version 2.20.

Transformer Engine stores such a matrix as bytes [M, K] and the scales that cuBLASLt reads: of tiles [K/128, M], of
blocks [M/128, K/128], rows of scales padded to multiples of four. Both operands are row-major, so no GEMM needs a
transposed copy (layout TN: the first one's transpose is taken). The operands are quantized here, with the tiles of its
recipe `Float8BlockScaling` (1 × 128 for activations and gradients, 128 × 128 for weights).

Letters: M, N, K sides of a product, Q tiles of a row.
"""

from typing import Any

import torch
from torch import Tensor
from transformer_engine.pytorch import DType
from transformer_engine.pytorch.cpp_extensions import general_gemm
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage

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

_FOURS = 4


class TransformerEngineBackend(ReferenceBackend):
    """FP8 backend by Transformer Engine. It quantizes as the reference does, and multiplies one expert at a time."""

    def gemm(self, x: RowwiseFp8Tensor, weight: Fp8Weight, dtype: torch.dtype) -> Tensor:
        """Implement `PrecisionBackend`."""
        rows, columns = len(x.values_XD), len(weight.values_NK)
        if not rows:
            return x.scales_XQ.new_empty((0, columns), dtype=dtype)
        out = _product(_of_tiles(x), _of_blocks(weight), gemm_output_dtype(dtype))
        return out[:rows, :columns].to(dtype)

    def grouped_wgrad_gemm(self, grad: ColumnwiseFp8Tensor, x: ColumnwiseFp8Tensor) -> Tensor:
        """Implement `PrecisionBackend`."""
        rows, columns = len(grad.tiles.values_XD), len(x.tiles.values_XD)
        products = []
        for ours, theirs in zip(split_by_expert(grad), split_by_expert(x), strict=True):
            if ours.values_XD.shape[1]:
                out = _product(_of_tiles(ours), _of_tiles(theirs), torch.float32)[:rows, :columns]
            else:
                out = ours.scales_XQ.new_zeros((rows, columns))
            products.append(out)
        return torch.stack(products)


def _product(a: Any, b: Any, dtype: torch.dtype) -> Tensor:
    """Return a bᵀ. Transformer Engine orders operands as cuBLAS does, column-major, so `b` comes first."""
    out: Tensor = general_gemm(b, a, out_dtype=dtype, layout="TN", use_split_accumulator=True)[0]
    return out


def _of_tiles(tiles: RowwiseFp8Tensor) -> Any:
    values = _whole(tiles.values_XD)
    scales_QX = zero_pad(tiles.scales_XQ.T, tiles.scales_XQ.shape[1], round_up(len(values), _FOURS))
    return _storage(values, scales_QX, is_2D_scaled=False)


def _of_blocks(blocks: Fp8Weight) -> Any:
    values = _whole(blocks.values_NK)
    scales_PQ = zero_pad(blocks.scales_PQ, tiles_per_row(len(values)), round_up(blocks.scales_PQ.shape[1], _FOURS))
    return _storage(values, scales_PQ, is_2D_scaled=True)


def _whole(values: Tensor) -> Tensor:
    """Zero-pad both sides to multiples of 128, as Transformer Engine requires of what it quantizes."""
    return zero_pad(values, *(round_up(side, TILE_WIDTH) for side in values.shape))


def _storage(values: Tensor, scales: Tensor, *, is_2D_scaled: bool) -> Any:
    return Float8BlockwiseQTensorStorage(
        rowwise_data=values.view(torch.uint8),
        rowwise_scale_inv=scales,
        columnwise_data=None,
        columnwise_scale_inv=None,
        fp8_dtype=DType.kFloat8E4M3,
        quantizer=None,
        is_2D_scaled=is_2D_scaled,
    )
