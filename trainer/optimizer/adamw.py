"""torch's AdamW with its state made up front, so that checkpoints can load into it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..checkpoint.pieces import MODEL, Part
from .config import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


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


def state_parts(parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Iterator[Part]:
    """Everything of the optimizer that a checkpoint holds: the weights that it updates, and their moments."""
    for name, parameter in parameters.items():
        yield Part(MODEL, name, parameter)
        yield from (Part(kind, name, optimizer.state[parameter][kind]) for kind in MOMENTS)


def set_steps_done(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """How many steps the moments have seen."""
    for state in optimizer.state.values():
        state["step"].fill_(steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
