"""Weights in FP8, quantized once per step."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from shoestring.tests.trainer.precision.fp8_linear import WIDTH, linear, normal
from shoestring.trainer.precision.fp8 import Fp8LinearOps
from shoestring.trainer.precision.fp8_tensors import Fp8Weight, ScaleFormat
from shoestring.trainer.precision.reference import ReferenceBackend


@dataclass(frozen=True)
class Counting(ReferenceBackend):
    """A backend that records the shapes of the weights that it has quantized."""

    seen: list[torch.Size] = field(default_factory=list)

    def quantize_weight(self, weight: Tensor, scales: ScaleFormat) -> Fp8Weight:
        self.seen.append(weight.shape)
        return super().quantize_weight(weight, scales)


def test_weights_are_quantized_once_while_they_are_unchanged() -> None:
    module, counting = linear(), Counting()
    module.fp8 = Fp8LinearOps(counting)
    x = normal(4, WIDTH)
    for times in (1, 2):
        with module.fp8.weight_cache.enable_for_step():
            first = module(x)
            first.sum().backward()
            assert torch.equal(module(x), first)
        assert len(counting.seen) == times
        with torch.no_grad():
            module.weight.mul_(2)
    assert torch.equal(module(x), 4 * first / 2)  # outside of it every use quantizes again
    assert len(counting.seen) == 3
