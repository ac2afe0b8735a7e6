"""What computes in FP8: one small interface, several providers (report §3.3).

Letters: X rows, D width, R rows of activations, L experts on this rank; N, K sides of a weight [N, K].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from .reference import Reference
from .tiles import Blocks, Columns, Scales, Tiles

Rows = tuple[int, ...]
"""How many rows each expert of a stack of weights has; they follow each other."""


class Provider(Protocol):
    """Quantises, and multiplies what it has quantised. Sums are formed in FP32, 128 products at a time."""

    def tiles(self, x_XD: Tensor, scales: Scales) -> Tiles:
        """Rows in tiles of 1 × 128."""
        ...

    def columns(self, x_RD: Tensor, rows_L: Rows, scales: Scales) -> Columns:
        """Rows the other way round, in tiles of 128 × 1, those of each expert apart."""
        ...

    def blocks(self, weight: Tensor, scales: Scales) -> Blocks:
        """A weight [N, K] or a stack of them [L, N, K] in blocks of 128 × 128."""
        ...

    def multiply(self, x: Tiles, weight: Blocks, dtype: torch.dtype) -> Tensor:
        """x Wᵀ, [R, N] in `dtype`, of x [R, K] and W [N, K]."""
        ...

    def multiply_grouped(self, x: Tiles, weight: Blocks, rows_L: Rows, dtype: torch.dtype) -> Tensor:
        """The same, each row with the weight of its expert, of W [L, N, K]."""
        ...

    def outer(self, grad: Columns, x: Columns) -> Tensor:
        """gradᵀ x over the rows of each expert, FP32 [L, N, K]: the gradient of weights; 0 for one without rows."""
        ...


PROVIDERS = ("reference",)


def missing_for(name: str, device: torch.device) -> Iterator[str]:
    """Why the provider of this name cannot serve `device` here; nothing where it can."""
    yield from ()


def open_provider(name: str, device: torch.device) -> Provider:
    """The provider of this name; `auto` takes the fastest that serves `device`."""
    return Reference()
