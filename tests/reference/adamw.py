"""AdamW with decoupled weight decay (arXiv 1711.05101) and clipping by the global norm, one tensor after another."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdamW:
    """The report's settings (§4.2). It does not give `eps`: 1e-8 is the usual value. `clip_norm` None: no clipping."""

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0


@dataclass
class Moments:
    """Steps taken so far, and the running means of the gradient and of its square, by parameter name."""

    steps: int = 0
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)


def global_norm(gradients: Mapping[str, Tensor]) -> float:
    """The Euclidean norm of all gradients taken as one vector, summed in FP64."""
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))


@torch.no_grad()
def adamw_step(
    params: Mapping[str, Tensor], gradients: Mapping[str, Tensor], moments: Moments, settings: AdamW
) -> float:
    """Step in place on `params` and `moments`, for each parameter that has a gradient. Return the unclipped norm.

    Only parameters with two or more dimensions decay: norms do not. Moments have the dtype of their parameter.
    """
    norm = global_norm(gradients)
    clip = 1.0 if settings.clip_norm is None or norm <= settings.clip_norm else settings.clip_norm / norm
    moments.steps += 1
    for name, gradient in gradients.items():
        weight, g = params[name], gradient.to(params[name].dtype) * clip
        m = moments.first.get(name, torch.zeros_like(weight))
        v = moments.second.get(name, torch.zeros_like(weight))
        moments.first[name] = m = settings.beta1 * m + (1 - settings.beta1) * g
        moments.second[name] = v = settings.beta2 * v + (1 - settings.beta2) * g.square()
        m_hat = m / (1 - settings.beta1**moments.steps)
        v_hat = v / (1 - settings.beta2**moments.steps)
        if weight.ndim >= 2:
            weight *= 1 - settings.learning_rate * settings.weight_decay
        weight -= settings.learning_rate * m_hat / (v_hat.sqrt() + settings.eps)
    return norm
