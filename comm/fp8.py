"""FP8 quantizer: E4M3 values with a power-of-two scale per 1 x 128 tile of a row (report §3.3).

Tokens cross between ranks in this format; `trainer/precision/fp8_tensors.py` builds GEMM operands from the same parts.

Letters: X rows, D width, Q tiles of a row.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .units import ceil_div

TILE_WIDTH = 128
"""Neighboring elements of a row that share a scale."""

E4M3_MAX = 448.0
"""The largest E4M3 number."""

_BIAS = 127
_NAN_EXPONENT = 255
_BIAS_DIFFERENCE = 120  # the bias of BF16's exponents less that of E4M3's
_SIGN_AND_VALUE_BITS = 0x87F0 - 2**16  # as int16: the bits of BF16 that E4M3 has too


@dataclass(frozen=True)
class QuantizedRows:
    """Rows quantized by `quantize`, for GEMMs that take FP8 operands."""

    values_XD: Tensor
    """float8_e4m3fn, row-major."""
    exponents_XQ: Tensor
    """Exponents of the scales, uint8 in the E8M0 format."""


def tiles_per_row(width: int) -> int:
    """Return Q, the number of scales of a row; the last tile may be narrower than the others."""
    return ceil_div(width, TILE_WIDTH)


def quantize(x_XD: Tensor) -> tuple[Tensor, Tensor]:
    """Return values, float8_e4m3fn [X, D], and scale exponents, uint8 [X, Q] in the E8M0 format: 2^(e - 127).

    The scale is the smallest power of two that brings the tile's largest magnitude a to 448 at most. The error of an
    element x is at most max(|x| / 16, a / 2^17): half a unit in the last place, above and below the smallest normal
    number. A tile that contains infinity or NaN becomes NaN.
    """
    # Scales are powers of two, as in the report, so that multiplying by them is exact.
    x_XQI = split_into_tiles(x_XD)
    exponents_XQ = compute_scale_exponents(torch.maximum(x_XQI.amax(dim=-1), -x_XQI.amin(dim=-1)))
    scaled_XQI = torch.div(
        x_XQI, scales_from_exponents(exponents_XQ, x_XQI.dtype)[..., None], out=_reusable_buffer(x_XQI, x_XD)
    )
    # torch's cast saturates: infinity would become 448. The exponent of such a tile is NaN, so the fault survives.
    values_XD = scaled_XQI.flatten(1)[:, : x_XD.shape[1]].to(torch.float8_e4m3fn)
    return values_XD.contiguous(), exponents_XQ


def dequantize(values_XD: Tensor, exponents_XQ: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the [X, D] values of `quantize` in `dtype`. Exact in every dtype with at least E4M3's 3 mantissa bits."""
    tiles = exponents_XQ.shape[1]
    if values_XD.device.type == "cpu" and bool((exponents_XQ < _NAN_EXPONENT - _BIAS_DIFFERENCE).all()):
        wide_XD, exponents_XQ = (
            _shift_bits(values_XD).to(dtype),
            exponents_XQ + _BIAS_DIFFERENCE,
        )  # one pass for both
    else:
        wide_XD = upcast_e4m3(values_XD, dtype)
    missing = tiles * TILE_WIDTH - wide_XD.shape[1]
    if missing:
        wide_XD = F.pad(wide_XD, (0, missing))
    wide_XD.view(-1, tiles, TILE_WIDTH).mul_(exponents_XQ.view(torch.float8_e8m0fnu).to(dtype)[..., None])
    return wide_XD[:, : values_XD.shape[1]] if missing else wide_XD


def nan_placeholder(values_XD: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [X, D] of NaN in `dtype` in the memory of one element: a placeholder for rows that only exist in FP8."""
    # Autograd needs a tensor of the dtype that gradients have. NaN shows a product that reads it by mistake.
    return values_XD.new_full((1, 1), torch.nan, dtype=dtype).expand(values_XD.shape)


def compute_scale_exponents(largest: Tensor, format_max: float = E4M3_MAX) -> Tensor:
    """Return the smallest scale 2^(e - 127) that brings each magnitude to `format_max` at most: e, uint8 in E8M0."""
    limit_mantissa, limit_exponent = math.frexp(format_max)
    mantissa, exponent = torch.frexp(largest)
    scale = exponent - limit_exponent + (mantissa > limit_mantissa).to(exponent.dtype)
    # At least 2^-126: dividing by a smaller scale could overflow FP32.
    stored = (scale + _BIAS).clamp(min=1).masked_fill(largest == 0, 1)
    broken = ~torch.isfinite(largest) | (stored >= _NAN_EXPONENT)
    return stored.masked_fill(broken, _NAN_EXPONENT).to(torch.uint8)


def scales_from_exponents(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the powers of two of E8M0 exponents in `dtype`, FP32 at least."""
    return exponents.view(torch.float8_e8m0fnu).to(torch.promote_types(dtype, torch.float32))


def upcast_e4m3(values_XD: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of E4M3 values in a wider dtype.

    On a CPU a NaN may become 480; its scale is NaN, so the product is.
    """
    if values_XD.device.type != "cpu":
        return values_XD.to(dtype)
    return _shift_bits(values_XD).mul_(2.0**_BIAS_DIFFERENCE).to(dtype)


def _shift_bits(values_XD: Tensor) -> Tensor:
    """Return the E4M3 values times 2^-120 in BF16: the bits of E4M3 at the positions of BF16's."""
    # The exponent biases are 7 and 127, hence 2^-120. On a CPU torch's conversion takes ten times as long.
    bits_XD = values_XD.view(torch.int8).to(torch.int16)  # the sign in all upper bits
    bits_XD.bitwise_left_shift_(4).bitwise_and_(_SIGN_AND_VALUE_BITS)
    return bits_XD.view(torch.bfloat16)


def _reusable_buffer(x_XQI: Tensor, x_XD: Tensor) -> Tensor | None:
    """Return memory to write the scaled tiles into: the tiles if they are a copy of `x_XD`, else None."""
    is_copy: bool = x_XQI.untyped_storage()._cdata != x_XD.untyped_storage()._cdata  # fake tensors have no addresses
    return x_XQI if is_copy else None


def split_into_tiles(x_XD: Tensor) -> Tensor:
    """Return [X, Q, 128] in FP32 at least, with zeros after a last tile that is not whole."""
    rows, width = x_XD.shape
    wide_XD = x_XD.to(torch.promote_types(x_XD.dtype, torch.float32))
    missing = tiles_per_row(width) * TILE_WIDTH - width
    whole_XD = F.pad(wide_XD, (0, missing)) if missing else wide_XD.contiguous()
    return whole_XD.view(rows, tiles_per_row(width), TILE_WIDTH)
