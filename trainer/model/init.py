"""Initial weights that depend only on the seed and the parameter's name, not on the parallel layout."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from .model import Model


@torch.no_grad()
def initialize_weights(model: Model, seed: int) -> None:
    """Set all weights to N(0, `initializer_range`²) (report §4.2), norms to 1 and routing biases to 0, in place."""
    # One generator per expert, seeded by its number in the whole layer: every expert-parallel size gives equal weights.
    expert_names = model.expert_parameter_names()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        elif name in expert_names:
            for index, expert in enumerate(parameter):
                _fill(expert, f"{name}.{model.first_local_expert + index}", seed, model.config.initializer_range)
        else:
            _fill(parameter, name, seed, model.config.initializer_range)
    for _, router in model.routers():
        router.bias_E.zero_()


def _fill(weight: Tensor, name: str, seed: int, std: float) -> None:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    weight.copy_(torch.randn(weight.shape, generator=generator).mul_(std))
