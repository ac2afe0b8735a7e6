"""FP8 weights, quantized once per step and used by all its micro-batches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from .fp8_tensors import Fp8Weight


@dataclass
class _Kept:
    blocks: dict[Tensor, Fp8Weight] = field(default_factory=dict)
    transposed: dict[Tensor, Fp8Weight] = field(default_factory=dict)


class Fp8WeightCache:
    """Cache of FP8 weights, valid while the caller promises that no weight changes."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None
        self.last_step_bytes = 0
        """Bytes of all FP8 weights of the last step."""

    def get_or_quantize(self, weight: Tensor, quantize: Callable[[Tensor], Fp8Weight]) -> Fp8Weight:
        """Return the cached FP8 blocks of `weight`, or quantize it."""
        if self._kept is None:
            return quantize(weight.detach())
        if weight not in self._kept.blocks:
            self._kept.blocks[weight] = quantize(weight.detach())
        return self._kept.blocks[weight]

    def get_transposed(self, weight: Tensor, blocks: Fp8Weight) -> Fp8Weight:
        """Return the transpose of `blocks`, the FP8 blocks of `weight`."""
        # The cached transpose is a contiguous copy: tensor cores read E4M3 operands only along K.
        if self._kept is None:
            return blocks.transposed()
        if weight not in self._kept.transposed:
            self._kept.transposed[weight] = blocks.transposed().contiguous()
        return self._kept.transposed[weight]

    @contextmanager
    def enable_for_step(self) -> Iterator[None]:
        """Return a context in which weights do not change: each is quantized at its first use and freed at the end."""
        self._kept = _Kept()
        try:
            yield
        finally:
            every = [*self._kept.blocks.values(), *self._kept.transposed.values()]
            self.last_step_bytes = sum(blocks.values_NK.nbytes + blocks.scales_PQ.nbytes for blocks in every)
            self._kept = None
