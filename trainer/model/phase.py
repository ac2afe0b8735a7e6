"""One compute phase: an ordinary autograd function cut from its neighbours, so that communication can run between."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...parallelism.pipeline.weight_grad import WeightGradients


class Phase:
    """Runs a function on detached inputs and, later, its backward alone: first of the inputs, then of the weights.

    Under `torch.no_grad` it is the function and nothing more.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> None:
        """`inputs` and the function's results are floating point tensors."""
        self._inputs = tuple(x.detach().requires_grad_(torch.is_grad_enabled()) for x in inputs)
        self._weights = WeightGradients()
        with self._weights.collect():
            self._outputs = function(*self._inputs)
        self.outputs = tuple(x.detach() for x in self._outputs)

    def backward(self, weights: WeightGradients, *grads: Tensor) -> tuple[Tensor, ...]:
        """Take each output's gradient, return those of the inputs; what is left to do for weights goes to `weights`.

        Without inputs all of it is for weights.
        """
        outputs, self._outputs, self.outputs = self._outputs, (), ()  # activations are freed here, not with the tape
        if not self._inputs:
            weights.add(lambda: self._run(outputs, grads))
            return ()
        torch.autograd.backward(outputs, grads)
        weights.take_over(self._weights)
        grad_inputs = tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in self._inputs)
        self._inputs = ()
        return grad_inputs

    def _run(self, outputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> None:
        torch.autograd.backward(outputs, grads)
        self._weights.run()
