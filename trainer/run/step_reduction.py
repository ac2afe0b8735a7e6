"""Sum over all ranks at the end of a step, in one vector: losses, gradient norm, loads, routing biases, votes.

On a GPU a collective of a few numbers costs as much as one of a few thousand, and reading it makes the host wait. So
everything that a step needs from other ranks is summed by one all-reduce and read once.

Letters: N routers of the whole model, E experts.
"""

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
    """Contribution of one rank."""

    loss_sums: Tensor
    """Sums of the main cross-entropy, the MTP cross-entropy and the balance loss: FP64 [3] on the device."""
    grad_square_sum: Tensor
    """Square sum of the gradients that this rank owns: FP64 [] on the device."""
    tokens_per_expert_E: Mapping[str, Tensor]
    """Expert loads (int64 [E]) of this rank's tokens, by name of the local routers."""
    router_bias_E: Mapping[str, Tensor]
    """Routing biases that this rank sends; the biases of a router are equal on all ranks that hold it."""
    token_counts: TokenCounts
    votes: Sequence[bool]


@dataclass(frozen=True)
class StepTotals:
    """Sums over all ranks, equal on every rank and on the host."""

    loss_sums: tuple[float, float, float]
    grad_square_sum: float
    tokens_per_expert_E: dict[str, Tensor]
    """Expert loads (int64 [E]) of every router of the model."""
    router_bias_E: dict[str, Tensor]
    """Routing biases (FP32 [E]) of every router of the model, before the step."""
    token_counts: TokenCounts
    vote_counts: tuple[int, ...]
    """Number of ranks on which each vote is true."""


def all_reduce_step_totals(share: RankStepTotals, routers: Sequence[str], experts: int, world: Group) -> StepTotals:
    """Sum the shares of all ranks by one all-reduce, and read the sums once. Collective.

    `routers` are those of the whole model, equal on all ranks.
    """
    # Counts stay exact in the FP64 vector: it holds every integer up to 2^53, which is 9,007 T tokens.
    vector = torch.cat([part.flatten() for part in _parts(share, routers, experts)])
    host = to_host(world.all_reduce_sum(vector, "sums of a step"))
    loads = len(routers) * experts
    sizes = (_LOSSES, _SQUARES, _VISITS, len(share.votes), len(routers), loads, loads)
    losses, squares, visits, votes, holders, counts, biases = host.split(sizes)
    counts_NE = counts.view(-1, experts).to(torch.int64)
    # One rank sends a router's biases if it is in one stage, two if both directions of a bidirectional schedule hold
    # it: the mean is exact either way, because the copies are equal.
    bias_NE = (biases.view(-1, experts) / holders[:, None]).to(torch.float32)
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
    """Return the length of the vector."""
    return _LOSSES + _SQUARES + _VISITS + votes + routers * (1 + 2 * experts)


def _parts(share: RankStepTotals, routers: Sequence[str], experts: int) -> Iterator[Tensor]:
    """Yield the parts of the vector in order: FP64 on the device."""
    device = share.loss_sums.device
    holders = [name in share.router_bias_E for name in routers]
    numbers = [*share.token_counts.as_tuple(), *share.votes, *holders]
    zeros_E = torch.zeros(experts, dtype=torch.float64, device=device)
    yield share.loss_sums
    yield share.grad_square_sum
    # Host values in one tensor: one copy to the device.
    yield to_device(torch.tensor(numbers, dtype=torch.float64), device)
    for values_E in (share.tokens_per_expert_E, share.router_bias_E):
        # The layout is that of the whole model: ranks without a router add zeros, so all vectors have one length.
        if routers:
            yield torch.stack([values_E[name].double() if name in values_E else zeros_E for name in routers])
