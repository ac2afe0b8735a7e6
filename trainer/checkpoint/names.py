"""The training state of one rank as a flat dictionary of tensors, each under a name that is unique over all ranks.

Experts are entries of their own, by their number in the whole layer. A name never means different tensors on two ranks:
the checkpoint library takes equal names for replicas and keeps one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..model.model import Model

MOMENTS = ("exp_avg", "exp_avg_sq")


def named_state(model: Model, optimizer: torch.optim.Optimizer, rng: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters, moments and routing biases as views, so that loading into them changes the model; and `rng`."""
    state: dict[str, Tensor] = dict(rng)
    for name, parameter in model.named_parameters():
        moments = optimizer.state[parameter]
        for kind, tensor in (("model", parameter.detach()), *((kind, moments[kind]) for kind in MOMENTS)):
            state.update((f"{kind}/{part}", view) for part, view in _parts(model, name, tensor))
    for layer, router in model.routers():
        state[f"routing_bias/{layer}"] = router.bias_E
    return state


def _parts(model: Model, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if name not in model.expert_parameter_names():
        yield name, tensor
        return
    for index, expert in enumerate(tensor):
        yield f"{name}/expert_{model.first_expert + index:04d}", expert
