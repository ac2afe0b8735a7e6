"""Gradients of the global batch: summed over a parameter's replicas, their norm counted once, one verdict for all.

The loss is already scaled by global counts, so reduction is a sum and never an average.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..comm.groups import Group
from ..comm.host import to_host

_PIECE = 2**16  # elements: 512 KB in FP64


@dataclass(frozen=True)
class Replicated:
    """Some parameters of one rank, all with replicas on the same ranks. Their order must be equal on all of these."""

    parameters: tuple[Tensor, ...]
    group: Group
    counts: bool
    """Whether it is this rank whose squares count in the norm: one of those that hold the same numbers."""


@dataclass(frozen=True)
class Gradients:
    """Every parameter of one rank. Groups must come in an order that all ranks agree on."""

    replicated: tuple[Replicated, ...]
    world: Group

    def reduce(self) -> None:
        """Sum every gradient over its replicas, in place. A parameter that was not reached counts as zero."""
        for share in self.replicated:
            _sum_flat(share.parameters, share.group)

    def norm(self) -> float:
        """The 2-norm over all parameters of the model, after `reduce`; equal on all ranks, each parameter counted once.

        Squares are summed in FP64. NaN or infinity anywhere makes it NaN or infinite everywhere.
        """
        counted = [parameter for share in self.replicated if share.counts for parameter in share.parameters]
        total = self.world.all_reduce_sum(_sum_of_squares(counted), "gradient norm")
        return float(total.sqrt().item())

    def scale(self, factor: float) -> None:
        """Multiply every gradient."""
        grads = [_grad(parameter) for share in self.replicated for parameter in share.parameters]
        torch._foreach_mul_(grads, factor)


def _grad(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _sum_flat(parameters: Sequence[Tensor], group: Group) -> None:
    grads = [_grad(parameter) for parameter in parameters]
    if group.size == 1 or not grads:
        return
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    group.all_reduce_sum(flat, "sum of gradients")
    pieces = flat.split([grad.numel() for grad in grads])
    for grad, piece in zip(grads, pieces, strict=True):
        grad.copy_(piece.view_as(grad))


def _sum_of_squares(parameters: Iterable[Tensor]) -> Tensor:
    """FP64, 0-dimensional, on the CPU, where the sums of all devices meet.

    The FP64 copy is made a piece at a time, in a buffer that stays in a cache: of whole gradients it costs more than
    the optimizer.
    """
    sums = [_squares_of(piece) for parameter in parameters for piece in _grad(parameter).reshape(-1).split(_PIECE)]
    return to_host(torch.stack(sums).sum()) if sums else torch.zeros((), dtype=torch.float64)


def _squares_of(piece: Tensor) -> Tensor:
    wide = piece.double()
    return torch.dot(wide, wide)
