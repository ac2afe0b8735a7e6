"""A Linear in FP8, and numbers for it."""

import torch
from torch import Tensor

from shoestring.trainer.model.linear import Linear
from shoestring.trainer.precision.fp8 import Fp8LinearOps
from shoestring.trainer.precision.reference import ReferenceBackend

WIDTH, INNER = 200, 96


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def linear(after_attention: bool = False) -> Linear:
    module = Linear(WIDTH, 150, after_attention=after_attention)
    with torch.no_grad():
        module.weight.copy_(normal(150, WIDTH))
    module.fp8 = Fp8LinearOps(ReferenceBackend())
    return module
