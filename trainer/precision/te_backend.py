"""FP8 products by Transformer Engine's block-scaled GEMM. Not yet run on hardware; written to version 2.20.

Transformer Engine keeps such a matrix as bytes [M, K] and scales that cuBLASLt reads: of tiles [K/128, M], of blocks
[M/128, K/128], rows of scales filled up to whole fours. Both factors are given row by row, so no product needs its own
transposition (layout TN: the first one's transpose is taken). It quantizes nothing here: the tiles are ours, as its
recipe `Float8BlockScaling` would make them (1 × 128 for activations and gradients, 128 × 128 for weights).

Letters: M, N, K sides of a product, Q tiles of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformer_engine.pytorch import DType
from transformer_engine.pytorch.cpp_extensions import general_gemm
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage

from ...comm.fp8 import TILE, tiles_of
from .reference import Reference, of_experts
from .tiles import Blocks, Columns, Tiles, accumulated, padded, rounded_up

_FOURS = 4


@dataclass(frozen=True)
class TransformerEngineBackend(Reference):
    """Quantizes as the reference does; experts are multiplied one at a time."""

    def multiply(self, x: Tiles, weight: Blocks, dtype: torch.dtype) -> Tensor:
        """See `PrecisionBackend`."""
        rows, columns = len(x.values_XD), len(weight.values_NK)
        if not rows:
            return x.scales_XQ.new_empty((0, columns), dtype=dtype)
        out = _product(_of_tiles(x), _of_blocks(weight), accumulated(dtype))
        return out[:rows, :columns].to(dtype)

    def outer(self, grad: Columns, x: Columns) -> Tensor:
        """See `PrecisionBackend`."""
        rows, columns = len(grad.tiles.values_XD), len(x.tiles.values_XD)
        products = []
        for ours, theirs in zip(of_experts(grad), of_experts(x), strict=True):
            if ours.values_XD.shape[1]:
                out = _product(_of_tiles(ours), _of_tiles(theirs), torch.float32)[:rows, :columns]
            else:
                out = ours.scales_XQ.new_zeros((rows, columns))
            products.append(out)
        return torch.stack(products)


def _product(a: Any, b: Any, dtype: torch.dtype) -> Tensor:
    """a bᵀ. Transformer Engine names the factors as cuBLAS does, column by column, so the second one comes first."""
    out: Tensor = general_gemm(b, a, out_dtype=dtype, layout="TN", use_split_accumulator=True)[0]
    return out


def _of_tiles(tiles: Tiles) -> Any:
    values = _whole(tiles.values_XD)
    scales_QX = padded(tiles.scales_XQ.T, tiles.scales_XQ.shape[1], rounded_up(len(values), _FOURS))
    return _storage(values, scales_QX, is_2D_scaled=False)


def _of_blocks(blocks: Blocks) -> Any:
    values = _whole(blocks.values_NK)
    scales_PQ = padded(blocks.scales_PQ, tiles_of(len(values)), rounded_up(blocks.scales_PQ.shape[1], _FOURS))
    return _storage(values, scales_PQ, is_2D_scaled=True)


def _whole(values: Tensor) -> Tensor:
    """Both sides multiples of 128, as Transformer Engine wants what it quantizes to be."""
    return padded(values, *(rounded_up(side, TILE) for side in values.shape))


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
