"""Compute phase whose backward runs separately from its neighbors', so that communication can run in between."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ...parallelism.weight_grad import DelayedWeightGradients
from .recompute import SelectiveRecompute


class SplitBackward:
    """Function on detached inputs whose backward runs later and alone: first of the inputs, then of the weights.

    It holds the tensors that autograd saved for the backward, but neither inputs nor outputs. Under `torch.no_grad` it
    only calls the function.
    """

    def __init__(
        self, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor, recompute: SelectiveRecompute | None = None
    ) -> None:
        """Call `function`; `inputs` and the results are floating point tensors."""
        self._weights = DelayedWeightGradients()
        self._has_inputs = bool(inputs)
        self._grads: list[Tensor] = []
        recompute = recompute or SelectiveRecompute()
        if inputs and torch.is_grad_enabled():
            start = torch.empty(0, requires_grad=True)
            inputs = _Beginning.apply(self._grads, start, *inputs)  # type: ignore[no-untyped-call]
        with self._weights.collect_from_forward(), recompute.enable():
            outputs = function(*inputs)
        # Gradient edges instead of tensors: the graph can run backward without holding the outputs' memory.
        self._ends = tuple(get_gradient_edge(x) for x in outputs) if torch.is_grad_enabled() else ()
        self._outputs = tuple(x.detach() for x in outputs)

    def pop_outputs(self) -> tuple[Tensor, ...]:
        """Return the function's results, once; from then on only the caller holds them."""
        outputs, self._outputs = self._outputs, ()
        return outputs

    def backward_inputs(self, weights: DelayedWeightGradients, *grads: Tensor) -> tuple[Tensor, ...]:
        """Return the inputs' gradients, given those of the outputs; add delayed weight gradients to `weights`.

        Without inputs the whole backward is delayed.
        """
        ends, self._ends = self._ends, ()  # frees the activations now, not with the micro-batch's context
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
    """First node of a phase's graph; its backward collects the inputs' gradients and holds none of their memory."""

    # `start` requires a gradient, which it never gets: otherwise autograd would not run the backward of this node.
    @staticmethod
    def forward(ctx: Any, found: list[Tensor], start: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.found = found
        return tuple(x.detach() for x in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        ctx.found.extend(grads)
        return (None, None, *(None for _ in grads))
