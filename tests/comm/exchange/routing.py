"""Routings that an exchange must survive, and a small layer of experts to send through it.

Letters: T tokens, D width, E experts, K experts per token, L experts per rank, R rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from shoestring.comm.async_comm import AsyncCommunicator, build_async_communicator
from shoestring.comm.exchange.api import TokenExchange
from shoestring.comm.exchange.config import ExchangeConfig
from shoestring.comm.exchange.factory import build_token_exchange
from shoestring.comm.groups import ProcessGroups
from shoestring.comm.topology import Topology
from shoestring.comm.trace import ExchangeLabel
from shoestring.comm.traffic import TrafficCounter

EXPERTS = 16
WIDTH = 160  # more than one tile of 128, and not whole tiles
LABEL = ExchangeLabel("layer_01", 2)


@dataclass(frozen=True)
class Case:
    """A routing: which rank sends which tokens where."""

    top_k: int
    groups: int | None = None
    """Number of expert groups (nodes) that a token may visit; None for all."""
    empty: bool = False
    """Give every second rank no token."""
    overload: bool = False
    """Send every token to the first K experts: some ranks receive everything, others nothing."""

    @property
    def name(self) -> str:
        """The case's name in test IDs and messages."""
        limit = "" if self.groups is None else f" in {self.groups} nodes"
        return f"top {self.top_k}{limit}{' empty' * self.empty}{' overload' * self.overload}"


CASES = (
    *(Case(top_k) for top_k in range(1, 9)),
    Case(4, groups=1),
    Case(8, groups=2),
    Case(3, empty=True),
    Case(6, groups=2, empty=True),
    Case(1, overload=True),
    Case(4, overload=True, empty=True),
)


@dataclass(frozen=True)
class Batch:
    """The tokens that one rank sends, with their experts and weights."""

    tokens_TD: Tensor
    weights_TK: Tensor
    experts_TK: Tensor
    grad_TD: Tensor
    """Gradient of the combined tokens."""


def batch_of(case: Case, topology: Topology, rank: int, dtype: torch.dtype) -> Batch:
    """Return the rank's batch; the numbers are equal in every dtype, up to rounding."""
    generator = torch.Generator().manual_seed(1000 * case.top_k + rank)
    count = 0 if case.empty and rank % 2 else 5 + 3 * rank
    score_TE = torch.rand(count, EXPERTS, generator=generator)
    limit = topology.nodes_per_ep_group if case.groups is None else min(case.groups, topology.nodes_per_ep_group)
    node_score_TN = torch.rand(count, topology.nodes_per_ep_group, generator=generator)
    closed_TN = torch.ones_like(node_score_TN).scatter_(1, node_score_TN.topk(limit).indices, 0)
    score_TE -= closed_TN.repeat_interleave(EXPERTS // topology.nodes_per_ep_group, dim=1)
    experts_TK = score_TE.topk(case.top_k).indices
    if case.overload:
        experts_TK = torch.arange(case.top_k).expand(count, -1)
    tokens_TD, grad_TD = torch.randn(2, count, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    weights_TK = torch.rand(count, case.top_k, generator=generator, dtype=torch.float64)
    return Batch(tokens_TD, weights_TK.to(torch.promote_types(dtype, torch.float32)), experts_TK, grad_TD)


def expert_scales(dtype: torch.dtype) -> Tensor:
    """Return one scale vector per expert, [E, D]."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(EXPERTS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def open_on(
    topology: Topology, rank: int, config: ExchangeConfig, groups: ProcessGroups | None = None
) -> tuple[TokenExchange[object], TrafficCounter, AsyncCommunicator]:
    """Build the exchange of `rank`; return it with its traffic counter and its communicator."""
    groups = groups or ProcessGroups.create(topology, rank, timedelta(seconds=30))
    traffic, worker = TrafficCounter(topology, rank), build_async_communicator(groups.ep, torch.device("cpu"))
    return build_token_exchange(config, groups, EXPERTS, worker, traffic), traffic, worker


def through_experts(
    exchange: TokenExchange[object], batch: Batch, topology: Topology, rank: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield every input and output of an expert layer by name: results and gradients."""
    received = exchange.dispatch(batch.tokens_TD, batch.weights_TK, batch.experts_TK, LABEL).wait()
    local = EXPERTS // topology.ep
    first = topology.ep_rank(rank) * local
    scales_LD = expert_scales(batch.tokens_TD.dtype)[first : first + local].requires_grad_()
    rows_RD, weights_R = received.rows_RD.requires_grad_(), received.gate_weights_R.requires_grad_()
    scales_RD = scales_LD.repeat_interleave(torch.tensor(received.rows_per_expert_L), dim=0)
    out_RD = (rows_RD * scales_RD * weights_R[:, None]).to(rows_RD.dtype)
    yield "out", exchange.combine(out_RD.detach(), received).wait()
    out_RD.backward(exchange.combine_backward(batch.grad_TD, received).wait())
    assert rows_RD.grad is not None
    assert weights_R.grad is not None
    grad_TD, grad_weights_TK = exchange.dispatch_backward(rows_RD.grad, weights_R.grad, received).wait()
    yield "tokens' gradient", grad_TD
    yield "gates' gradient", grad_weights_TK
    yield "experts' gradient", torch.zeros_like(scales_LD) if scales_LD.grad is None else scales_LD.grad


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).norm()) / (float(theirs.double().norm()) or 1.0)
