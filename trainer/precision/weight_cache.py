"""FP8 weights, quantized once per step and used by all its micro-batches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from .fp8_tensors import Fp8Weight


class Fp8WeightCache:
    """Cache of FP8 weights, valid while the caller promises that no weight changes."""

    def __init__(self) -> None:
        self._is_enabled = False
        self._blocks: dict[Tensor, Fp8Weight] = {}
        self._transposed: dict[Tensor, Fp8Weight] = {}
        self.last_step_bytes = 0
        """Bytes of all FP8 weights of the last step."""

    def get_or_quantize(self, weight: Tensor, quantize: Callable[[Tensor], Fp8Weight]) -> Fp8Weight:
        """Return the cached FP8 blocks of `weight`, or quantize it."""
        if not self._is_enabled:
            return quantize(weight.detach())
        if weight not in self._blocks:
            self._blocks[weight] = quantize(weight.detach())
        return self._blocks[weight]

    def get_transposed(self, weight: Tensor, blocks: Fp8Weight) -> Fp8Weight:
        """Return the transpose of `blocks`, the FP8 blocks of `weight`."""
        # The cached transpose is a contiguous copy: tensor cores read E4M3 operands only along K.
        if not self._is_enabled:
            return blocks.transposed()
        if weight not in self._transposed:
            self._transposed[weight] = blocks.transposed().contiguous()
        return self._transposed[weight]

    @contextmanager
    def enable_for_step(self) -> Iterator[None]:
        """Return a context in which weights do not change: each is quantized at its first use and freed at the end."""
        self._is_enabled = True
        try:
            yield
        finally:
            every = [*self._blocks.values(), *self._transposed.values()]
            self.last_step_bytes = sum(blocks.values_NK.nbytes + blocks.scales_PQ.nbytes for blocks in every)
            self._blocks.clear()
            self._transposed.clear()
            self._is_enabled = False
