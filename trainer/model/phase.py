"""One compute phase: an ordinary autograd function cut from its neighbours, so that communication can run between."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Phase:
    """Runs a function on detached inputs and, later, its backward alone.

    Under `torch.no_grad` it is the function and nothing more.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> None:
        """`inputs` and the function's results are floating point tensors."""
        self._inputs = tuple(x.detach().requires_grad_(torch.is_grad_enabled()) for x in inputs)
        self._outputs = function(*self._inputs)
        self.outputs = tuple(x.detach() for x in self._outputs)

    def backward(self, *grads: Tensor) -> tuple[Tensor, ...]:
        """Take each output's gradient, add those of the parameters to their `.grad`, return those of the inputs."""
        torch.autograd.backward(self._outputs, grads)
        grad_inputs = tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in self._inputs)
        self._inputs = self._outputs = self.outputs = ()  # activations are freed here, not when the tape goes
        return grad_inputs
