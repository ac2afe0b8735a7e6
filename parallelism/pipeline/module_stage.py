"""Any `nn.Module` as a stage of a pipeline."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..weight_grad import DelayedWeightGradients
from .instruction import Resumable

LossFunction = Callable[[Tensor, int], Tensor]
"""Function of the last stage's output and the number of the micro-batch, to its part of the loss: a scalar."""


class ModuleStage:
    """`PipelineStage` of a module that maps one floating-point tensor to another.

    Gradients are added to the parameters' `.grad`. Weights that the module multiplies by `weight_grad.linear` or looks
    up by `weight_grad.embedding` get theirs in instruction W. Autograd computes those of all other weights together
    with the input's: there I does the whole backward and W nothing, so that a schedule with W gains no time.
    """

    def __init__(
        self,
        module: nn.Module,
        activation: Tensor,
        *,
        inputs: Sequence[Tensor] | None = None,
        loss: LossFunction | None = None,
    ) -> None:
        """Take `inputs`, by micro-batch and of any dtype, for the first stage, and `loss` for the last one.

        Messages between stages have shape, dtype and device of `activation`, which may be empty memory.
        """
        self.losses: dict[int, Tensor] = {}
        """Losses of the last run by micro-batch; empty before the last stage."""
        self._module, self._activation, self._inputs, self._loss = module, activation, inputs, loss
        self._saved: dict[int, tuple[Tensor, Tensor, DelayedWeightGradients]] = {}

    def forward(self, micro_batch: int, received: Tensor | None) -> Resumable[Tensor | None]:
        """See `PipelineStage`."""
        yield from ()
        weights = DelayedWeightGradients()
        if received is None:
            assert self._inputs is not None, "the first stage needs `inputs`"
            x = self._inputs[micro_batch]
        else:
            x = received.detach().requires_grad_()
        with weights.collect_from_forward():
            output: Tensor = self._module(x)
            if self._loss is not None:
                output = self._loss(output, micro_batch)
        if torch.is_grad_enabled():
            self._saved[micro_batch] = x, output, weights
        if self._loss is None:
            return output.detach()
        self.losses[micro_batch] = output.detach()
        return None

    def backward(
        self, micro_batch: int, received: Tensor | None, weights: DelayedWeightGradients
    ) -> Resumable[Tensor | None]:
        """See `PipelineStage`."""
        yield from ()
        x, output, left = self._saved.pop(micro_batch)
        output.backward(received)
        weights.move_tasks_from(left)
        weights.flush_unless_deferred()
        return x.grad if self._inputs is None else None

    def empty_activation(self, micro_batch: int) -> Tensor:
        """See `PipelineStage`."""
        return torch.empty_like(self._activation)
