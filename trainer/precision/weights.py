"""Weights in FP8, quantised once a step and used by all its micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from .tiles import Blocks


class StepWeights:
    """Keeps the blocks of each weight for as long as the caller promises that no weight changes."""

    def __init__(self) -> None:
        self._kept: dict[Tensor, Blocks] | None = None

    def blocks(self, weight: Tensor, quantise: Callable[[Tensor], Blocks]) -> Blocks:
        """Of this weight: those that are kept, or new ones."""
        if self._kept is None:
            return quantise(weight.detach())
        if weight not in self._kept:
            self._kept[weight] = quantise(weight.detach())
        return self._kept[weight]

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Inside, every weight keeps its value; its blocks are made at its first use and freed at the end."""
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None
