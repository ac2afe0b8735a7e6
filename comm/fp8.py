"""The one quantiser: FP8 E4M3 with a power-of-two scale for each tile of a row (report §3.3, tiles of 1 × 128).

Letters: X rows, D width, Q tiles of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128
"""Neighbouring elements of a row that share a scale."""

_LARGEST_MANTISSA = 0.875  # 448, the largest E4M3 number, is 0.875 · 2^9
_LARGEST_EXPONENT = 9
_BIAS = 127
_NOT_A_NUMBER = 255


def tiles_of(width: int) -> int:
    """Q, scales of a row; the last tile may be narrower than the others."""
    return -(-width // TILE)


def quantise(x_XD: Tensor) -> tuple[Tensor, Tensor]:
    """Values, float8_e4m3fn [X, D], and the exponents of their scales, uint8 [X, Q] in the E8M0 format: 2^(e - 127).

    The scale is the smallest power of two that brings the tile's largest magnitude to 448 at most. So an element x of a
    tile with largest magnitude a is off by at most max(|x| / 16, a / 2^17): half a unit of the last place, above and
    below the smallest normal number. A tile that holds infinity or NaN comes back as NaN throughout: a fault must not
    become a large number on its way.
    """
    x_XQI = _tiles(x_XD)
    largest_XQ = torch.maximum(x_XQI.amax(dim=-1), -x_XQI.amin(dim=-1))
    mantissa_XQ, exponent_XQ = torch.frexp(largest_XQ)
    scale_XQ = exponent_XQ - _LARGEST_EXPONENT + (mantissa_XQ > _LARGEST_MANTISSA).to(exponent_XQ.dtype)
    # Down to 2^-126, so that dividing by the scale cannot overflow.
    stored_XQ = (scale_XQ + _BIAS).clamp(min=1)
    broken_XQ = ~torch.isfinite(largest_XQ) | (stored_XQ >= _NOT_A_NUMBER)
    exponents_XQ = stored_XQ.masked_fill(broken_XQ, _NOT_A_NUMBER).to(torch.uint8)
    scaled_XQI = x_XQI / _scales(exponents_XQ, x_XQI.dtype)[..., None]
    values_XD = scaled_XQI.flatten(1)[:, : x_XD.shape[1]].to(torch.float8_e4m3fn)
    return values_XD.contiguous(), exponents_XQ


def dequantise(values_XD: Tensor, exponents_XQ: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantise` made, as `dtype`, [X, D]. Exact in every dtype that has E4M3's three bits after the point."""
    wide = torch.promote_types(dtype, torch.float32)
    scaled_XQI = _tiles(_widened(values_XD, wide)) * _scales(exponents_XQ, wide)[..., None]
    return scaled_XQI.flatten(1)[:, : values_XD.shape[1]].to(dtype)


def _widened(values_XD: Tensor, dtype: torch.dtype) -> Tensor:
    """The same numbers in a wider dtype. On a CPU looking them up is faster than torch's own conversion."""
    if values_XD.device.type != "cpu":
        return values_XD.to(dtype)
    every_number = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(dtype)
    places = values_XD.view(torch.uint8).flatten().to(torch.int32)
    return every_number.index_select(0, places).view(values_XD.shape)


def _scales(exponents_XQ: Tensor, dtype: torch.dtype) -> Tensor:
    return exponents_XQ.view(torch.float8_e8m0fnu).to(torch.promote_types(dtype, torch.float32))


def _tiles(x_XD: Tensor) -> Tensor:
    """[X, Q, 128], FP32 at least, zeros behind a last tile that is not whole."""
    rows, width = x_XD.shape
    wide_XD = x_XD.to(torch.promote_types(x_XD.dtype, torch.float32))
    missing = tiles_of(width) * TILE - width
    whole_XD = F.pad(wide_XD, (0, missing)) if missing else wide_XD.contiguous()
    return whole_XD.view(rows, tiles_of(width), TILE)
