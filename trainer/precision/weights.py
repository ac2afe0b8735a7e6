"""Weights in FP8, quantized once a step and used by all its micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from ...comm.fp8 import tiles_of
from .tiles import Blocks

_SCALE = 4  # bytes


def blocks_bytes(shape: torch.Size) -> int:
    """Of one weight, or a stack of them, in blocks of 128 × 128."""
    *stack, rows, columns = shape
    return prod(stack) * (rows * columns + _SCALE * tiles_of(rows) * tiles_of(columns))


@dataclass
class _Kept:
    blocks: dict[Tensor, Blocks] = field(default_factory=dict)
    turned: dict[Tensor, Blocks] = field(default_factory=dict)


class StepWeights:
    """Keeps the blocks of each weight for as long as the caller promises that no weight changes."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None
        self.taken = 0
        """Bytes of all that the last step has made."""

    def blocks(self, weight: Tensor, quantize: Callable[[Tensor], Blocks]) -> Blocks:
        """Of this weight: those that are kept, or new ones."""
        if self._kept is None:
            return quantize(weight.detach())
        if weight not in self._kept.blocks:
            self._kept.blocks[weight] = quantize(weight.detach())
        return self._kept.blocks[weight]

    def turned(self, weight: Tensor, blocks: Blocks) -> Blocks:
        """The same transposed. What is kept is a copy, row by row: tensor cores read E4M3 in no other order."""
        if self._kept is None:
            return blocks.transposed()
        if weight not in self._kept.turned:
            self._kept.turned[weight] = blocks.transposed().contiguous()
        return self._kept.turned[weight]

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Inside, every weight keeps its value; its blocks are made at its first use and freed at the end."""
        self._kept = _Kept()
        try:
            yield
        finally:
            every = [*self._kept.blocks.values(), *self._kept.turned.values()]
            self.taken = sum(blocks.values_NK.nbytes + blocks.scales_PQ.nbytes for blocks in every)
            self._kept = None
