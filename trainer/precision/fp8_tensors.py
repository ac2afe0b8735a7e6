"""FP8 operands: E4M3 numbers, one scale for 1 × 128 activations or 128 × 128 weights (report §3.3.2).

The scale of a tile is its largest magnitude over 448, in FP32, or the smallest power of two that is not below that, as
`comm/fp8.py` makes it for what crosses between ranks. Numbers wider than FP32 are rounded to FP32 first. A tile that
holds infinity or NaN is NaN throughout. Libraries that want whole multiples get zeros behind the last row and column.

Letters: X rows, D width, Q tiles of a row; R rows of activations, L experts on this rank; N, K sides of a weight, P, Q
its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from ...comm.fp8 import (
    E4M3_MAX,
    TILE_WIDTH,
    QuantizedRows,
    compute_scale_exponents,
    scales_from_exponents,
    split_into_tiles,
    tiles_per_row,
    upcast_e4m3,
)

_SMALLEST_SCALE = 2.0**-126  # FP32's smallest normal number: dividing by it is exact


class ScaleFormat(StrEnum):
    """Which numbers may be scales."""

    FP32 = "fp32"
    POWER_OF_TWO = "power_of_two"


@dataclass(frozen=True)
class RowwiseFp8Tensor:
    """Rows, each 128 neighbors of one with a scale of their own."""

    values_XD: Tensor
    """float8_e4m3fn."""
    scales_XQ: Tensor
    """FP32."""

    @staticmethod
    def from_received(rows: QuantizedRows) -> RowwiseFp8Tensor:
        """What has crossed between ranks: the numbers as they are, and their powers of two as products take them."""
        return RowwiseFp8Tensor(rows.values_XD, scales_from_exponents(rows.exponents_XQ, torch.float32))

    def slice_rows(self, rows: slice) -> RowwiseFp8Tensor:
        """Some of the rows."""
        return RowwiseFp8Tensor(self.values_XD[rows], self.scales_XQ[rows])


@dataclass(frozen=True)
class ColumnwiseFp8Tensor:
    """Rows of activations the other way round, for products that sum over them: tiles of 128 × 1.

    Rows of different experts never share a tile: behind those of each expert, zeros fill its last one.
    """

    tiles: RowwiseFp8Tensor
    """[D, 128 · Q]."""
    tiles_per_expert_L: tuple[int, ...]


@dataclass(frozen=True)
class Fp8Weight:
    """A weight, or a stack of weights, each 128 × 128 of it with a scale of their own."""

    values_NK: Tensor
    """float8_e4m3fn, [..., N, K]."""
    scales_PQ: Tensor
    """FP32, [..., P, Q]."""

    def transposed(self) -> Fp8Weight:
        """The same numbers, [..., K, N]: a square block needs no quantizing for that."""
        return Fp8Weight(self.values_NK.transpose(-1, -2), self.scales_PQ.transpose(-1, -2))

    def contiguous(self) -> Fp8Weight:
        """The same, row by row in memory."""
        return Fp8Weight(self.values_NK.contiguous(), self.scales_PQ.contiguous())


def quantize_rowwise(x_XD: Tensor, scales: ScaleFormat) -> RowwiseFp8Tensor:
    """[X, D], any D."""
    x_XQI = split_into_tiles(x_XD.to(torch.float32))
    scales_XQ = _scale_for(torch.maximum(x_XQI.amax(dim=-1), -x_XQI.amin(dim=-1)), scales)
    scaled_XD = (x_XQI / scales_XQ[..., None]).flatten(1)[:, : x_XD.shape[1]]
    return RowwiseFp8Tensor(_to_e4m3(scaled_XD), scales_XQ)


def dequantize_rowwise(tiles: RowwiseFp8Tensor, dtype: torch.dtype) -> Tensor:
    """[X, D]."""
    x_XQI = split_into_tiles(upcast_e4m3(tiles.values_XD, torch.float32)) * tiles.scales_XQ[..., None]
    return x_XQI.flatten(1)[:, : tiles.values_XD.shape[1]].to(dtype)


def quantize_columnwise(x_RD: Tensor, rows_per_expert_L: Sequence[int], scales: ScaleFormat) -> ColumnwiseFp8Tensor:
    """[R, D]; the rows of each expert follow each other, as many as are said."""
    groups = tuple(tiles_per_row(rows) for rows in rows_per_expert_L)
    whole_RD = x_RD
    if any(rows % TILE_WIDTH for rows in rows_per_expert_L):
        parts = zip(x_RD.split(list(rows_per_expert_L)), groups, strict=True)
        whole_RD = torch.cat([F.pad(part, (0, 0, 0, count * TILE_WIDTH - len(part))) for part, count in parts])
    return ColumnwiseFp8Tensor(quantize_rowwise(whole_RD.T, scales), groups)


def quantize_weight(weight_NK: Tensor, scales: ScaleFormat) -> Fp8Weight:
    """[..., N, K], any N and K."""
    rows, columns = weight_NK.shape[-2:]
    missing = (0, tiles_per_row(columns) * TILE_WIDTH - columns, 0, tiles_per_row(rows) * TILE_WIDTH - rows)
    whole = F.pad(weight_NK.to(torch.float32), missing).unflatten(-1, (-1, TILE_WIDTH)).unflatten(-3, (-1, TILE_WIDTH))
    scales_PQ = _scale_for(whole.abs().amax(dim=-1).amax(dim=-2), scales)  # in two steps: the inner one is contiguous
    scaled = whole / scales_PQ[..., :, None, :, None]
    values_NK = scaled.flatten(-4, -3).flatten(-2, -1)[..., :rows, :columns]
    return Fp8Weight(_to_e4m3(values_NK), scales_PQ)


def dequantize_weight(blocks: Fp8Weight, dtype: torch.dtype) -> Tensor:
    """[..., N, K]."""
    values_NK = upcast_e4m3(blocks.values_NK, torch.float32)
    rows, columns = values_NK.shape[-2:]
    scales_NK = blocks.scales_PQ.repeat_interleave(TILE_WIDTH, -2)[..., :rows, :].repeat_interleave(TILE_WIDTH, -1)[
        ..., :columns
    ]
    return (values_NK * scales_NK).to(dtype)


def _scale_for(largest: Tensor, scales: ScaleFormat) -> Tensor:
    if scales is ScaleFormat.POWER_OF_TWO:
        return scales_from_exponents(compute_scale_exponents(largest), torch.float32)
    return (largest / E4M3_MAX).clamp(min=_SMALLEST_SCALE).masked_fill(~torch.isfinite(largest), torch.nan)


def _to_e4m3(scaled: Tensor) -> Tensor:
    """Nearest, ties to even. Nothing here is above 448 but by a rounding of the scale, which the cast saturates."""
    return scaled.to(torch.float8_e4m3fn).contiguous()


def round_up_to_multiple(size: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step


def zero_pad(x: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns], row by row, with `x` in its upper left corner."""
    if x.shape == (rows, columns):
        return x.contiguous()
    whole = torch.zeros((rows, columns), dtype=x.dtype, device=x.device)
    whole[: x.shape[0], : x.shape[1]] = x
    return whole


def gemm_output_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a product is written in on its way to `dtype`: BF16 as it is, else FP32."""
    return dtype if dtype == torch.bfloat16 else torch.float32


def promote_to_fp32(x: Tensor) -> Tensor:
    """`x` in FP32, or as it is where it is wider, so that FP64 runs stay FP64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
