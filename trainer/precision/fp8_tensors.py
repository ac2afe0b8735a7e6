"""FP8 tensors: E4M3 numbers with one scale per 1 × 128 activations or 128 × 128 weights (report §3.3.2).

The scale of a tile is its largest magnitude over 448, in FP32, or the smallest power of two that is not below that, as
`comm/fp8.py` computes it for the wire. Numbers wider than FP32 are rounded to FP32 first. A tile that holds infinity or
NaN becomes NaN. Libraries that require multiples of a size get zeros after the last row and column.

Letters: X rows, D width, Q tiles of a row; R rows of activations, L experts on this rank; N, K sides of a weight, P, Q
its blocks.
"""

import math
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

_SCALE_BYTES = 4
_SMALLEST_SCALE = 2.0**-126  # FP32's smallest normal number: division by it is exact


class ScaleFormat(StrEnum):
    """Format of FP8 scales."""

    FP32 = "fp32"
    POWER_OF_TWO = "power_of_two"


@dataclass(frozen=True)
class RowwiseFp8Tensor:
    """Rows in FP8, with one scale per 128 neighbors of a row."""

    values_XD: Tensor
    """Numbers, float8_e4m3fn."""
    scales_XQ: Tensor
    """Scales, FP32."""

    @staticmethod
    def from_received(rows: QuantizedRows) -> "RowwiseFp8Tensor":
        """Convert received FP8 rows: unchanged numbers, with scales in FP32 instead of exponents."""
        return RowwiseFp8Tensor(rows.values_XD, scales_from_exponents(rows.exponents_XQ, torch.float32))

    def slice_rows(self, rows: slice) -> "RowwiseFp8Tensor":
        """Return some of the rows, as views."""
        return RowwiseFp8Tensor(self.values_XD[rows], self.scales_XQ[rows])


@dataclass(frozen=True)
class ColumnwiseFp8Tensor:
    """Transposed rows in FP8 tiles of 128 × 1, for weight gradients, which sum over rows.

    Rows of different experts never share a tile: zeros pad the last tile of each expert.
    """

    tiles: RowwiseFp8Tensor
    """Transposed rows, [D, 128 · Q]."""
    tiles_per_expert_L: tuple[int, ...]


@dataclass(frozen=True)
class Fp8Weight:
    """Weight or stack of weights in FP8, with one scale per block of 128 × 128."""

    values_NK: Tensor
    """Numbers, float8_e4m3fn [..., N, K]."""
    scales_PQ: Tensor
    """Scales, FP32 [..., P, Q]."""

    def transposed(self) -> "Fp8Weight":
        """Return the transpose, [..., K, N], with the same numbers: square blocks need no new quantization."""
        return Fp8Weight(self.values_NK.transpose(-1, -2), self.scales_PQ.transpose(-1, -2))

    def contiguous(self) -> "Fp8Weight":
        """Return the tensor in row-major memory."""
        return Fp8Weight(self.values_NK.contiguous(), self.scales_PQ.contiguous())


def rowwise_fp8_bytes(rows: float, width: int) -> float:
    """Return the bytes of a `RowwiseFp8Tensor`."""
    return rows * (width + _SCALE_BYTES * tiles_per_row(width))


def columnwise_fp8_bytes(rows: float, width: int, experts: int = 1) -> float:
    """Return the bytes of a `ColumnwiseFp8Tensor` of rows that are spread evenly over `experts` experts."""
    return experts * math.ceil(rows / experts / TILE_WIDTH) * width * (TILE_WIDTH + _SCALE_BYTES)


def fp8_weight_bytes(shape: Sequence[int]) -> int:
    """Return the bytes of an `Fp8Weight` of this shape."""
    *stack, rows, columns = shape
    return math.prod(stack) * (rows * columns + _SCALE_BYTES * tiles_per_row(rows) * tiles_per_row(columns))


def quantize_rowwise(x_XD: Tensor, scales: ScaleFormat) -> RowwiseFp8Tensor:
    """Quantize [X, D], any D, in tiles of 1 × 128."""
    x_XQI = split_into_tiles(x_XD.to(torch.float32))
    scales_XQ = _scale_for(torch.maximum(x_XQI.amax(dim=-1), -x_XQI.amin(dim=-1)), scales)
    scaled_XD = (x_XQI / scales_XQ[..., None]).flatten(1)[:, : x_XD.shape[1]]
    return RowwiseFp8Tensor(_to_e4m3(scaled_XD), scales_XQ)


def dequantize_rowwise(tiles: RowwiseFp8Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers [X, D] of `tiles` in `dtype`."""
    x_XQI = split_into_tiles(upcast_e4m3(tiles.values_XD, torch.float32)) * tiles.scales_XQ[..., None]
    return x_XQI.flatten(1)[:, : tiles.values_XD.shape[1]].to(dtype)


def quantize_columnwise(x_RD: Tensor, rows_per_expert_L: Sequence[int], scales: ScaleFormat) -> ColumnwiseFp8Tensor:
    """Quantize [R, D], rows sorted by expert, in tiles of 128 × 1."""
    groups = tuple(tiles_per_row(rows) for rows in rows_per_expert_L)
    whole_RD = x_RD
    if any(rows % TILE_WIDTH for rows in rows_per_expert_L):
        parts = zip(x_RD.split(list(rows_per_expert_L)), groups, strict=True)
        whole_RD = torch.cat([F.pad(part, (0, 0, 0, count * TILE_WIDTH - len(part))) for part, count in parts])
    return ColumnwiseFp8Tensor(quantize_rowwise(whole_RD.T, scales), groups)


def quantize_weight(weight_NK: Tensor, scales: ScaleFormat) -> Fp8Weight:
    """Quantize [..., N, K], any N and K, in blocks of 128 × 128."""
    rows, columns = weight_NK.shape[-2:]
    missing = (0, tiles_per_row(columns) * TILE_WIDTH - columns, 0, tiles_per_row(rows) * TILE_WIDTH - rows)
    whole = F.pad(weight_NK.to(torch.float32), missing).unflatten(-1, (-1, TILE_WIDTH)).unflatten(-3, (-1, TILE_WIDTH))
    scales_PQ = _scale_for(whole.abs().amax(dim=-1).amax(dim=-2), scales)  # two steps: the inner reads contiguously
    scaled = whole / scales_PQ[..., :, None, :, None]
    values_NK = scaled.flatten(-4, -3).flatten(-2, -1)[..., :rows, :columns]
    return Fp8Weight(_to_e4m3(values_NK), scales_PQ)


def dequantize_weight(blocks: Fp8Weight, dtype: torch.dtype) -> Tensor:
    """Return the numbers [..., N, K] of `blocks` in `dtype`."""
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
    """Round to E4M3, to nearest, ties to even."""
    # Only the rounding of the scale can bring a number above 448, and the cast saturates it.
    return scaled.to(torch.float8_e4m3fn).contiguous()


def zero_pad(x: Tensor, rows: int, columns: int) -> Tensor:
    """Pad `x` with zeros to [rows, columns], contiguous."""
    if x.shape == (rows, columns):
        return x.contiguous()
    whole = torch.zeros((rows, columns), dtype=x.dtype, device=x.device)
    whole[: x.shape[0], : x.shape[1]] = x
    return whole


def gemm_output_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a GEMM writes a result of `dtype`: BF16 for BF16, else FP32."""
    return dtype if dtype == torch.bfloat16 else torch.float32


def promote_to_fp32(x: Tensor) -> Tensor:
    """Return `x` in FP32, or unchanged if it is wider, so that FP64 runs stay FP64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
