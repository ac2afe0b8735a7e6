"""Gradients of a fused operation and of its reference, from the same random numbers."""

from collections.abc import Callable

import torch
from torch import Tensor


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
