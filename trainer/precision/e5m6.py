"""E5M6: twelve-bit numbers with power-of-two scales, for activations that two backwards read (report §3.3.3).

The report saves the input of the Linear after attention in "a customized E5M6 data format" and does not define it. Here
it is FP16 without the last four bits of the mantissa: a sign, five exponent bits with a bias of 15, six mantissa bits,
largest number 65,024. Two numbers share three bytes.

Letters: X rows, D width (P when made even), Q tiles of a row.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...comm.fp8 import compute_scale_exponents, scales_from_exponents, split_into_tiles, tiles_per_row

_MANTISSA = 6
_DROPPED = 4  # bits of FP16's mantissa
_SMALLEST_EXPONENT = -14  # of a normal number
E5M6_MAX = 65_024.0
"""Largest E5M6 number, (1 - 2^-7) · 2^16."""


@dataclass(frozen=True)
class E5M6Rows:
    """Rows of E5M6 numbers."""

    bytes_XB: Tensor
    """Packed numbers, uint8: three bytes for two numbers of a row."""
    exponents_XQ: Tensor
    """Scale exponents of each 1 × 128, uint8 (E8M0)."""
    width: int
    """D, numbers per row."""


def pack_e5m6(x_XD: Tensor) -> E5M6Rows:
    """Pack [X, D], rounded to nearest, ties to even. A tile that holds infinity or NaN becomes NaN."""
    x_XQI = split_into_tiles(x_XD.to(torch.float32))
    exponents_XQ = compute_scale_exponents(torch.maximum(x_XQI.amax(dim=-1), -x_XQI.amin(dim=-1)), E5M6_MAX)
    scaled_XD = (x_XQI / scales_from_exponents(exponents_XQ, torch.float32)[..., None]).flatten(1)[:, : x_XD.shape[1]]
    codes_XD = _rounded(scaled_XD).to(torch.float16).view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)
    codes_XP = F.pad(codes_XD >> _DROPPED, (0, x_XD.shape[1] % 2))
    first, second = codes_XP[:, 0::2], codes_XP[:, 1::2]
    triples = torch.stack((first & 0xFF, first >> 8 | (second & 0xF) << 4, second >> 4), dim=-1)
    return E5M6Rows(triples.to(torch.uint8).flatten(1), exponents_XQ, x_XD.shape[1])


def unpack_e5m6(packed: E5M6Rows, dtype: torch.dtype) -> Tensor:
    """Unpack to [X, D]; exact in BF16 and wider."""
    low, middle, high = packed.bytes_XB.to(torch.int32).unflatten(1, (-1, 3)).unbind(-1)
    codes_XP = torch.stack((low | (middle & 0xF) << 8, middle >> 4 | high << 4), dim=-1).flatten(1)
    halves_XD = (codes_XP[:, : packed.width] << _DROPPED).to(torch.int16).view(torch.float16)
    x_XQI = split_into_tiles(halves_XD) * scales_from_exponents(packed.exponents_XQ, torch.float32)[..., None]
    return x_XQI.flatten(1)[:, : packed.width].to(dtype)


def _rounded(scaled_XD: Tensor) -> Tensor:
    """Round to six mantissa bits; below the smallest normal number, to its fixed step."""
    _, exponent_XD = torch.frexp(scaled_XD)
    step_XD = torch.ldexp(torch.ones_like(scaled_XD), (exponent_XD - 1).clamp(min=_SMALLEST_EXPONENT) - _MANTISSA)
    return (scaled_XD / step_XD).round_().mul_(step_XD)


def e5m6_bytes(rows: int, width: int) -> float:
    """Return the bytes of `E5M6Rows`."""
    return rows * (1.5 * (width + width % 2) + tiles_per_row(width))
