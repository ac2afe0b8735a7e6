"""One compute phase: an ordinary autograd function cut from its neighbors, so that communication can run between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ...parallelism.weight_grad import DelayedWeightGradients
from .recompute import SelectiveRecompute


class SplitBackward:
    """Runs a function on detached inputs and, later, its backward alone: first of the inputs, then of the weights.

    Of tensors it holds what autograd keeps for that backward, neither inputs nor outputs. Under `torch.no_grad` it is
    the function and nothing more.
    """

    def __init__(
        self, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor, recompute: SelectiveRecompute | None = None
    ) -> None:
        """`inputs` and the function's results are floating point tensors."""
        self._weights = DelayedWeightGradients()
        self._has_inputs = bool(inputs)
        self._grads: list[Tensor] = []
        recompute = recompute or SelectiveRecompute()
        if inputs and torch.is_grad_enabled():
            start = torch.empty(0, requires_grad=True)
            inputs = _Beginning.apply(self._grads, start, *inputs)  # type: ignore[no-untyped-call]
        with self._weights.collect_from_forward(), recompute.enable():
            outputs = function(*inputs)
        self._ends = tuple(get_gradient_edge(x) for x in outputs) if torch.is_grad_enabled() else ()
        self._outputs = tuple(x.detach() for x in outputs)

    def pop_outputs(self) -> tuple[Tensor, ...]:
        """The function's results, once: they are freed when whoever takes them is done with them."""
        outputs, self._outputs = self._outputs, ()
        return outputs

    def backward_inputs(self, weights: DelayedWeightGradients, *grads: Tensor) -> tuple[Tensor, ...]:
        """Take each output's gradient, return those of the inputs; what is left to do for weights goes to `weights`.

        Without inputs all of it is for weights.
        """
        ends, self._ends = self._ends, ()  # activations are freed here, not with the tape
        if not self._has_inputs:
            weights.add_task(lambda: self._run(ends, grads))
            return ()
        torch.autograd.backward(ends, grads)
        weights.move_tasks_from(self._weights)
        grad_inputs = tuple(self._grads)
        self._grads.clear()
        return grad_inputs

    def _run(self, ends: tuple[Any, ...], grads: tuple[Tensor, ...]) -> None:
        torch.autograd.backward(ends, grads)
        self._weights.flush()


class _Beginning(torch.autograd.Function):
    """Where a phase's backward ends: leaves the gradients of its inputs, of whose memory it holds nothing.

    `start` needs a gradient, which it never gets: without one autograd would not come this far.
    """

    @staticmethod
    def forward(ctx: Any, found: list[Tensor], start: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.found = found
        return tuple(x.detach() for x in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        ctx.found.extend(grads)
        return (None, None, *(None for _ in grads))
