"""Reference of FP8 GEMMs in plain tensor operations, on any device; every faster backend is compared with it.

A GEMM sums 128 neighboring products exactly and rounds to FP32, multiplies by both scales, and adds to an FP32 total,
tile by tile. Tensor cores with promotion every 128 elements do the same (report §3.3.2), except for their short
accumulator, which `emulate_hopper_gemm` models (report §3.3.2; ISCA'25 paper §3.1.1).

Letters: X and Y rows of two operands, Q tiles, K inner dimension, I products of one instruction; R rows of activations,
F inner width, L experts on this rank; N, K sides of a weight.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from ...comm.fp8 import TILE_WIDTH, upcast_e4m3
from .backend import PrecisionBackend
from .fp8_tensors import Fp8Weight, RowwiseFp8Tensor

PRODUCTS_PER_INSTRUCTION = 32
"""Products that one tensor-core instruction sums for each element."""

_FP32, _FP64 = 4, 8  # bytes
_FRACTION = 13  # bits after the leading one that the alignment keeps


def exact_gemm(a_XK: Tensor, b_YK: Tensor) -> Tensor:
    """Return a bᵀ of E4M3 numbers given in FP64, rounded once to FP32, [X, Y]."""
    # Products are multiples of 2^-18 and at most 2^18, so up to K = 2^17 every partial sum is exact in FP64's 53 bits,
    # and the result does not depend on the library's order of summation.
    return (a_XK @ b_YK.T).to(torch.float32)


def emulate_hopper_gemm(a_XK: Tensor, b_YK: Tensor, promote_every: int | None = None) -> Tensor:
    """Return a bᵀ as Hopper's tensor cores sum it: in an FP32 accumulator that keeps 13 bits after the leading one.

    Each instruction adds 32 products to the accumulator: all 33 terms are aligned to the largest exponent among them
    and truncated to 13 fraction bits, before the sum and after it. After every `promote_every` elements the accumulator
    is added to an FP32 register and set to 0.
    """
    total_XY = torch.zeros((len(a_XK), len(b_YK)), dtype=torch.float32, device=a_XK.device)
    held_XY = total_XY.double()
    for start in range(0, a_XK.shape[1], PRODUCTS_PER_INSTRUCTION):
        part = slice(start, start + PRODUCTS_PER_INSTRUCTION)
        products_XYI = a_XK[:, None, part] * b_YK[None, :, part]
        terms_XYI = torch.cat((products_XYI, held_XY[..., None]), dim=-1)
        step_XY = _step(terms_XYI.abs().amax(dim=-1))
        held_XY = _cut(terms_XYI, step_XY[..., None]).sum(dim=-1)
        held_XY = _cut(held_XY, _step(held_XY.abs()))
        if promote_every is not None and (start + PRODUCTS_PER_INSTRUCTION) % promote_every == 0:
            total_XY += held_XY.to(torch.float32)
            held_XY = torch.zeros_like(held_XY)
    return total_XY + held_XY.to(torch.float32)


def _step(largest: Tensor) -> Tensor:
    """Return the value of the last bit that is kept of a number of this magnitude, and of those aligned with it."""
    _, exponent = torch.frexp(largest)
    return torch.ldexp(torch.ones_like(largest), exponent - 1 - _FRACTION)


def _cut(x: Tensor, step: Tensor) -> Tensor:
    return (x / step).trunc().mul_(step)


@dataclass(frozen=True)
class ReferenceBackend(PrecisionBackend):
    """FP8 backend in plain tensor operations; `tile_gemm` sums the products of one tile, exactly or as Hopper does."""

    tile_gemm: Callable[[Tensor, Tensor], Tensor] = exact_gemm

    @override
    def product(self, a: RowwiseFp8Tensor, b: RowwiseFp8Tensor | Fp8Weight, dtype: torch.dtype) -> Tensor:
        if isinstance(b, Fp8Weight):
            b = RowwiseFp8Tensor(b.values_NK, b.scales_PQ.repeat_interleave(TILE_WIDTH, 0)[: len(b.values_NK)])
        a_XK, b_YK = upcast_e4m3(a.values_XD, torch.float64), upcast_e4m3(b.values_XD, torch.float64)
        total_XY = a_XK.new_zeros((len(a_XK), len(b_YK)), dtype=torch.float32)
        for tile, start in enumerate(range(0, a_XK.shape[1], TILE_WIDTH)):
            sum_XY = self.tile_gemm(a_XK[:, start : start + TILE_WIDTH], b_YK[:, start : start + TILE_WIDTH])
            total_XY += sum_XY.mul_(a.scales_XQ[:, tile, None]).mul_(b.scales_XQ[:, tile])
        return total_XY.to(dtype)


def gemm_workspace_bytes(rows: float, inputs: int, outputs: int, result_bytes: int, experts: int = 1) -> float:
    """Return the workspace of `gemm`, or of `grouped_gemm` over `experts` experts: FP64 operands and two sums."""
    # One expert at a time; the results, of `result_bytes` per number, are concatenated, which holds them twice.
    one, joined = rows / experts, 2 * rows * outputs * result_bytes if experts > 1 else 0.0
    return _FP64 * (one * inputs + outputs * inputs + 2 * one * outputs) + joined


def quantize_columnwise_workspace_bytes(rows: float, width: int, experts: int = 1) -> float:
    """Return the workspace of `quantize_columnwise` of rows that are spread evenly over `experts` experts."""
    # Three FP32 copies of the rows, padded to whole tiles: padded, transposed, and divided by their scales.
    return 3 * _FP32 * experts * _whole_tiles(rows / experts) * width


def wgrad_workspace_bytes(rows: float, inputs: int, outputs: int) -> float:
    """Return the workspace of one expert in `grouped_wgrad_gemm`: FP64 operands and one tile's sum."""
    return _FP64 * _whole_tiles(rows) * (inputs + outputs) + inputs * outputs * (_FP64 + _FP32)


def _whole_tiles(rows: float) -> int:
    return TILE_WIDTH * math.ceil(rows / TILE_WIDTH)
