"""FP8 products with plain tensors, on any device: the definition that every faster provider is compared with.

A product sums 128 neighbours exactly and rounds to FP32, multiplies by both scales, and adds to an FP32 total, tile by
tile: what tensor cores with promotion every 128 elements do (report §3.3.2), without their short accumulator.

Letters: X and Y rows of two factors, Q tiles; R rows of activations, F inner width, L experts on this rank; N, K sides
of a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...comm.fp8 import TILE, widened
from .accumulate import exact_sum
from .swiglu import swiglu_of_rows
from .tiles import Blocks, Columns, Scales, Tiles, dequantise_tiles, quantise_blocks, quantise_columns, quantise_tiles


@dataclass(frozen=True)
class Reference:
    """`sum_tile` sums the products of one tile, see `accumulate.py`: exactly, or as Hopper does."""

    sum_tile: Callable[[Tensor, Tensor], Tensor] = exact_sum

    def tiles(self, x_XD: Tensor, scales: Scales) -> Tiles:
        """See `Provider`."""
        return quantise_tiles(x_XD, scales)

    def swiglu_tiles(self, gate_up_RF: Tensor, gates_R: Tensor | None, scales: Scales) -> Tiles:
        """See `Provider`."""
        return self.tiles(swiglu_of_rows(gate_up_RF, gates_R), scales)

    def columns(self, x_RD: Tensor, rows_L: tuple[int, ...], scales: Scales) -> Columns:
        """See `Provider`."""
        return quantise_columns(x_RD, rows_L, scales)

    def turned(self, x: Tiles, rows_L: tuple[int, ...], scales: Scales) -> Columns:
        """See `Provider`."""
        return self.columns(dequantise_tiles(x, torch.float32), rows_L, scales)

    def swiglu_columns(
        self, gate_up_RF: Tensor, gates_R: Tensor | None, rows_L: tuple[int, ...], scales: Scales
    ) -> Columns:
        """See `Provider`."""
        return self.columns(swiglu_of_rows(gate_up_RF, gates_R), rows_L, scales)

    def blocks(self, weight: Tensor, scales: Scales) -> Blocks:
        """See `Provider`."""
        return quantise_blocks(weight, scales)

    def multiply(self, x: Tiles, weight: Blocks, dtype: torch.dtype) -> Tensor:
        """See `Provider`."""
        scales_NQ = weight.scales_PQ.repeat_interleave(TILE, 0)[: len(weight.values_NK)]
        return self._product(x, Tiles(weight.values_NK, scales_NQ)).to(dtype)

    def multiply_grouped(self, x: Tiles, weight: Blocks, rows_L: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See `Provider`."""
        rows = zip(x.values_XD.split(rows_L), x.scales_XQ.split(rows_L), strict=True)
        weights = zip(weight.values_NK, weight.scales_PQ, strict=True)
        parts = zip(rows, weights, strict=True)
        return torch.cat([self.multiply(Tiles(*own), Blocks(*expert), dtype) for own, expert in parts])

    def outer(self, grad: Columns, x: Columns) -> Tensor:
        """See `Provider`."""
        both = zip(of_experts(grad), of_experts(x), strict=True)
        return torch.stack([self._product(ours, theirs) for ours, theirs in both])

    def add_outer(self, grad: Columns, x: Columns, sum_LNK: Tensor) -> None:
        """See `Provider`."""
        sum_LNK += self.outer(grad, x)

    def _product(self, a: Tiles, b: Tiles) -> Tensor:
        """a bᵀ of X rows and Y rows, FP32 [X, Y]."""
        a_XK, b_YK = widened(a.values_XD, torch.float64), widened(b.values_XD, torch.float64)
        total_XY = a_XK.new_zeros((len(a_XK), len(b_YK)), dtype=torch.float32)
        for tile, start in enumerate(range(0, a_XK.shape[1], TILE)):
            sum_XY = self.sum_tile(a_XK[:, start : start + TILE], b_YK[:, start : start + TILE])
            total_XY += sum_XY.mul_(a.scales_XQ[:, tile, None]).mul_(b.scales_XQ[:, tile])
        return total_XY


def of_experts(columns: Columns) -> list[Tiles]:
    """What belongs to each expert."""
    counts = columns.tiles_per_expert_L
    values = columns.tiles.values_XD.split([count * TILE for count in counts], dim=1)
    scales = columns.tiles.scales_XQ.split(counts, dim=1)
    return [Tiles(own, scale) for own, scale in zip(values, scales, strict=True)]
