"""Weights in FP8, quantized once a step and used by all its micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from ...comm.fp8 import tiles_per_row
from .fp8_tensors import Fp8Weight

_SCALE = 4  # bytes


def fp8_weight_bytes(shape: torch.Size) -> int:
    """Of one weight, or a stack of them, in blocks of 128 × 128."""
    *stack, rows, columns = shape
    return prod(stack) * (rows * columns + _SCALE * tiles_per_row(rows) * tiles_per_row(columns))


@dataclass
class _Kept:
    blocks: dict[Tensor, Fp8Weight] = field(default_factory=dict)
    turned: dict[Tensor, Fp8Weight] = field(default_factory=dict)


class Fp8WeightCache:
    """Keeps the blocks of each weight for as long as the caller promises that no weight changes."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None
        self.last_step_bytes = 0
        """Bytes of all that the last step has made."""

    def get_or_quantize(self, weight: Tensor, quantize: Callable[[Tensor], Fp8Weight]) -> Fp8Weight:
        """Of this weight: those that are kept, or new ones."""
        if self._kept is None:
            return quantize(weight.detach())
        if weight not in self._kept.blocks:
            self._kept.blocks[weight] = quantize(weight.detach())
        return self._kept.blocks[weight]

    def get_transposed(self, weight: Tensor, blocks: Fp8Weight) -> Fp8Weight:
        """The same transposed. What is kept is a copy, row by row: tensor cores read E4M3 in no other order."""
        if self._kept is None:
            return blocks.transposed()
        if weight not in self._kept.turned:
            self._kept.turned[weight] = blocks.transposed().contiguous()
        return self._kept.turned[weight]

    @contextmanager
    def enable_for_step(self) -> Iterator[None]:
        """Inside, every weight keeps its value; its blocks are made at its first use and freed at the end."""
        self._kept = _Kept()
        try:
            yield
        finally:
            every = [*self._kept.blocks.values(), *self._kept.turned.values()]
            self.last_step_bytes = sum(blocks.values_NK.nbytes + blocks.scales_PQ.nbytes for blocks in every)
            self._kept = None
