"""Weights in FP8, quantized once a step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from shoestring.tests.trainer.precision.fp8_linear import WIDTH, linear, normal
from shoestring.trainer.precision.fp8 import Fp8
from shoestring.trainer.precision.reference import Reference
from shoestring.trainer.precision.tiles import Blocks, Scales


@dataclass(frozen=True)
class Counting(Reference):
    """Remembers the shapes of the weights that it has quantized."""

    seen: list[torch.Size] = field(default_factory=list)

    def blocks(self, weight: Tensor, scales: Scales) -> Blocks:
        self.seen.append(weight.shape)
        return super().blocks(weight, scales)


def test_weights_are_quantized_once_while_they_are_unchanged() -> None:
    module, counting = linear(), Counting()
    module.fp8 = Fp8(counting)
    x = normal(4, WIDTH)
    for times in (1, 2):
        with module.fp8.weights.unchanged():
            first = module(x)
            first.sum().backward()
            assert torch.equal(module(x), first)
        assert len(counting.seen) == times
        with torch.no_grad():
            module.weight.mul_(2)
    assert torch.equal(module(x), 4 * first / 2)  # outside of it every use quantizes anew
    assert len(counting.seen) == 3
