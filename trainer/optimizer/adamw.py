"""torch's AdamW with its state made up front, so that checkpoints can load into it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .config import OptimizerConfig


def build_adamw(parameters: Mapping[str, Tensor], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over named parameters; weight decay on those with two dimensions or more.

    Moments have each parameter's own dtype. `set_learning_rate` must be called before each step.
    """
    decayed = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    kept = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}],
        lr=0.0,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
