"""What a step sums over all ranks, in one vector: losses, gradient norm, loads, routing biases, votes.

On a GPU a collective of a few numbers costs as much as one of a few thousand, and reading it makes the host wait. So
everything that a step needs of other ranks at its end travels in one all-reduce and is read once.

Letters: N routers of the whole model, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...comm.exchange.permutation import TokenCounts
from ...comm.groups import Group
from ...comm.host_transfer import to_device, to_host

_LOSSES, _SQUARES, _VISITS = 3, 1, 4  # how many numbers


@dataclass(frozen=True)
class RankStepTotals:
    """What one rank adds."""

    loss_sums: Tensor
    """FP64 [3] on the device: sums of the main model's cross-entropy, of MTP's, and of the balance loss."""
    grad_square_sum: Tensor
    """FP64, 0-dimensional, on the device: of the gradients that this rank owns."""
    tokens_per_expert_E: Mapping[str, Tensor]
    """int64 load of the routers here, by name, of this rank's tokens."""
    router_bias_E: Mapping[str, Tensor]
    """Routing biases that this rank speaks for; those of one router are equal wherever it is."""
    token_counts: TokenCounts
    votes: Sequence[bool]


@dataclass(frozen=True)
class StepTotals:
    """The sums, equal on every rank and on the host."""

    loss_sums: tuple[float, float, float]
    grad_square_sum: float
    tokens_per_expert_E: dict[str, Tensor]
    """int64, of every router of the model."""
    router_bias_E: dict[str, Tensor]
    """FP32, of every router of the model, before the step."""
    token_counts: TokenCounts
    vote_counts: tuple[int, ...]
    """On how many ranks each vote is true."""


def all_reduce_step_totals(share: RankStepTotals, routers: Sequence[str], experts: int, world: Group) -> StepTotals:
    """Collective: sum the shares of all ranks by one all-reduce, and read the sums once.

    `routers` are those of the whole model, equal on all ranks. Counts are exact: FP64 holds every integer up to 2^53,
    which is 9,007 T tokens.
    """
    vector = torch.cat([part.flatten() for part in _parts(share, routers, experts)])
    host = to_host(world.all_reduce_sum(vector, "sums of a step"))
    loads = len(routers) * experts
    sizes = (_LOSSES, _SQUARES, _VISITS, len(share.votes), len(routers), loads, loads)
    losses, squares, visits, votes, speakers, counts, biases = host.split(sizes)
    counts_NE = counts.view(-1, experts).to(torch.int64)
    bias_NE = (biases.view(-1, experts) / speakers[:, None]).to(torch.float32)
    main, mtp, balance = losses.tolist()
    return StepTotals(
        loss_sums=(main, mtp, balance),
        grad_square_sum=float(squares),
        tokens_per_expert_E=dict(zip(routers, counts_NE.unbind(), strict=True)),
        router_bias_E=dict(zip(routers, bias_NE.unbind(), strict=True)),
        token_counts=TokenCounts(*map(int, visits.tolist())),
        vote_counts=tuple(map(int, votes.tolist())),
    )


def reduction_length(routers: int, experts: int, votes: int) -> int:
    """Return how many numbers travel."""
    return _LOSSES + _SQUARES + _VISITS + votes + routers * (1 + 2 * experts)


def _parts(share: RankStepTotals, routers: Sequence[str], experts: int) -> Iterator[Tensor]:
    """The vector's parts in order, FP64 on the device."""
    device = share.loss_sums.device
    speakers = [name in share.router_bias_E for name in routers]
    numbers = [*share.token_counts.as_tuple(), *share.votes, *speakers]
    nothing_E = torch.zeros(experts, dtype=torch.float64, device=device)
    yield share.loss_sums
    yield share.grad_square_sum
    yield to_device(torch.tensor(numbers, dtype=torch.float64), device)
    for values_E in (share.tokens_per_expert_E, share.router_bias_E):
        if routers:
            yield torch.stack([values_E[name].double() if name in values_E else nothing_E for name in routers])
