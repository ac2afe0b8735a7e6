"""The one quantizer: FP8 E4M3 with a power-of-two scale for each tile of a row (report §3.3, tiles of 1 × 128).

Rows cross between ranks like this; `trainer/precision/tiles.trainer/precision/fp8_tensors.py` makes of the same parts what matrix products take.

Letters: X rows, D width, Q tiles of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_WIDTH = 128
"""Neighboring elements of a row that share a scale."""

E4M3_MAX = 448.0
"""The largest E4M3 number."""

_BIAS = 127
_NOT_A_NUMBER = 255
_LIFT = 120  # the bias of BF16's exponents less that of E4M3's
_SIGN_AND_NUMBER = 0x87F0 - 2**16  # as int16: the bits of BF16 that E4M3 has too


@dataclass(frozen=True)
class QuantizedRows:
    """Rows as `quantize` makes them, for whoever multiplies these very numbers."""

    values_XD: Tensor
    """float8_e4m3fn, row by row in memory."""
    exponents_XQ: Tensor
    """uint8, E8M0."""


def tiles_per_row(width: int) -> int:
    """Q, scales of a row; the last tile may be narrower than the others."""
    return -(-width // TILE_WIDTH)


def quantize(x_XD: Tensor) -> tuple[Tensor, Tensor]:
    """Values, float8_e4m3fn [X, D], and the exponents of their scales, uint8 [X, Q] in the E8M0 format: 2^(e - 127).

    The scale is the smallest power of two that brings the tile's largest magnitude to 448 at most. So an element x of a
    tile with largest magnitude a is off by at most max(|x| / 16, a / 2^17): half a unit of the last place, above and
    below the smallest normal number. A tile that holds infinity or NaN comes back as NaN throughout: a fault must not
    become a large number on its way.
    """
    x_XQI = split_into_tiles(x_XD)
    exponents_XQ = compute_scale_exponents(torch.maximum(x_XQI.amax(dim=-1), -x_XQI.amin(dim=-1)))
    scaled_XQI = torch.div(x_XQI, scales_from_exponents(exponents_XQ, x_XQI.dtype)[..., None], out=_own(x_XQI, x_XD))
    values_XD = scaled_XQI.flatten(1)[:, : x_XD.shape[1]].to(torch.float8_e4m3fn)
    return values_XD.contiguous(), exponents_XQ


def dequantize(values_XD: Tensor, exponents_XQ: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantize` made, as `dtype`, [X, D]. Exact in every dtype that has E4M3's three bits after the point."""
    tiles = exponents_XQ.shape[1]
    if values_XD.device.type == "cpu" and bool((exponents_XQ < _NOT_A_NUMBER - _LIFT).all()):
        wide_XD, exponents_XQ = _moved(values_XD).to(dtype), exponents_XQ + _LIFT  # one pass for both factors
    else:
        wide_XD = upcast_e4m3(values_XD, dtype)
    missing = tiles * TILE_WIDTH - wide_XD.shape[1]
    if missing:
        wide_XD = F.pad(wide_XD, (0, missing))
    wide_XD.view(-1, tiles, TILE_WIDTH).mul_(exponents_XQ.view(torch.float8_e8m0fnu).to(dtype)[..., None])
    return wide_XD[:, : values_XD.shape[1]] if missing else wide_XD


def nan_placeholder(values_XD: Tensor, dtype: torch.dtype) -> Tensor:
    """NaN throughout, [X, D] in `dtype`, in the memory of one number: in the place of rows that nobody reads.

    Where tiles have the numbers, autograd still wants a tensor of the dtype that gradients are to have.
    """
    return values_XD.new_full((1, 1), torch.nan, dtype=dtype).expand(values_XD.shape)


def compute_scale_exponents(largest: Tensor, format_max: float = E4M3_MAX) -> Tensor:
    """The smallest power of two that brings each of these magnitudes to `limit` at most, uint8 in the E8M0 format."""
    limit_mantissa, limit_exponent = math.frexp(format_max)
    mantissa, exponent = torch.frexp(largest)
    scale = exponent - limit_exponent + (mantissa > limit_mantissa).to(exponent.dtype)
    # Down to 2^-126, so that dividing by the scale cannot overflow.
    stored = (scale + _BIAS).clamp(min=1).masked_fill(largest == 0, 1)
    broken = ~torch.isfinite(largest) | (stored >= _NOT_A_NUMBER)
    return stored.masked_fill(broken, _NOT_A_NUMBER).to(torch.uint8)


def scales_from_exponents(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """The powers of two that E8M0 numbers stand for, in `dtype`, FP32 at least."""
    return exponents.view(torch.float8_e8m0fnu).to(torch.promote_types(dtype, torch.float32))


def upcast_e4m3(values_XD: Tensor, dtype: torch.dtype) -> Tensor:
    """E4M3 numbers in a wider dtype, in memory of their own.

    NaN may become 480 on a CPU, but comes with a scale that is NaN.
    """
    if values_XD.device.type != "cpu":
        return values_XD.to(dtype)
    return _moved(values_XD).mul_(2.0**_LIFT).to(dtype)


def _moved(values_XD: Tensor) -> Tensor:
    """The numbers times 2^-120 in BF16: E4M3's bits, moved to where BF16 has its own, for the biases differ by that.

    On a CPU torch's own conversion takes ten times as long.
    """
    bits_XD = values_XD.view(torch.int8).to(torch.int16)  # the sign in all upper bits
    bits_XD.bitwise_left_shift_(4).bitwise_and_(_SIGN_AND_NUMBER)
    return bits_XD.view(torch.bfloat16)


def _own(x_XQI: Tensor, x_XD: Tensor) -> Tensor | None:
    """Memory to write into: the tiles themselves, where they are a copy of `x_XD`."""
    is_copy: bool = x_XQI.untyped_storage()._cdata != x_XD.untyped_storage()._cdata  # fake tensors have no addresses
    return x_XQI if is_copy else None


def split_into_tiles(x_XD: Tensor) -> Tensor:
    """[X, Q, 128], FP32 at least, zeros behind a last tile that is not whole."""
    rows, width = x_XD.shape
    wide_XD = x_XD.to(torch.promote_types(x_XD.dtype, torch.float32))
    missing = tiles_per_row(width) * TILE_WIDTH - width
    whole_XD = F.pad(wide_XD, (0, missing)) if missing else wide_XD.contiguous()
    return whole_XD.view(rows, tiles_per_row(width), TILE_WIDTH)
