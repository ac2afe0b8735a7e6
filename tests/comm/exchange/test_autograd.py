"""Differentiable dispatch and combine on several ranks against one process that holds every expert."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from shoestring.comm.async_comm import build_async_communicator
from shoestring.comm.exchange import (
    ExchangeConfig,
    ExpertGroups,
    FlatExchange,
    TokenExchange,
    TwoHopExchange,
    combine,
    dispatch,
)
from shoestring.comm.topology import LinkType
from shoestring.comm.traffic import TrafficCounter
from shoestring.tests.processes import World, run_processes

RANKS, EXPERTS, TOP_K, WIDTH = 4, 8, 3, 5
COUNTS = (6, 0, 9, 4)


def batch(rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, gates, experts, and the gradient of the layer's output, of one rank."""
    generator = torch.Generator().manual_seed(rank)
    tokens_TD, grad_TD = torch.randn(2, COUNTS[rank], WIDTH, dtype=torch.float64, generator=generator)
    gates_TK = torch.rand(COUNTS[rank], TOP_K, dtype=torch.float64, generator=generator)
    experts_TK = torch.rand(COUNTS[rank], EXPERTS, generator=generator).topk(TOP_K).indices
    return tokens_TD.requires_grad_(), gates_TK.requires_grad_(), experts_TK, grad_TD


def experts_weights() -> Tensor:
    generator = torch.Generator().manual_seed(100)
    return torch.randn(EXPERTS, WIDTH, WIDTH, dtype=torch.float64, generator=generator)


def layer(world: World, kind: str) -> tuple[Tensor, ...]:
    """Return output and gradients of tokens, gates and this rank's experts."""
    if kind == "two_hop":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "rank"))
        groups = ExpertGroups.from_process_groups(None, mesh.get_group("node"), mesh.get_group("rank"))
        exchange: TokenExchange[Any] = TwoHopExchange(groups, EXPERTS)
    else:
        groups = ExpertGroups.from_process_groups()
        worker = build_async_communicator(groups.ep, torch.device("cpu")) if kind == "threaded" else None
        exchange = FlatExchange(groups, EXPERTS, worker, TrafficCounter.by_nodes(groups), ExchangeConfig())
    tokens_TD, gates_TK, experts_TK, grad_TD = batch(world.rank)
    local = EXPERTS // world.size
    weights_LDD = experts_weights()[world.rank * local :][:local].requires_grad_()
    rows_RD, gates_R, received = dispatch(exchange, tokens_TD, gates_TK, experts_TK)
    parts = rows_RD.split(received.rows_per_expert_L)
    out_RD = torch.cat([(part @ weight).tanh() for part, weight in zip(parts, weights_LDD, strict=True)])
    out_TD = combine(exchange, out_RD * gates_R[:, None], received)
    out_TD.backward(grad_TD)
    assert isinstance(exchange, FlatExchange | TwoHopExchange)
    between_nodes = exchange.traffic.bytes_by_link(operation="dispatch")[LinkType.INFINIBAND]
    assert (between_nodes > 0) == (kind == "two_hop" and COUNTS[world.rank] > 0)
    grads = [x.grad for x in (tokens_TD, gates_TK, weights_LDD) if x.grad is not None]
    return (out_TD.detach(), *grads)


def dense_twin() -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Return what `layer` returns, of all ranks, without an exchange."""
    weights_EDD = experts_weights().requires_grad_()
    batches = [batch(rank) for rank in range(RANKS)]
    outs = []
    for tokens_TD, gates_TK, experts_TK, grad_TD in batches:
        all_TED = torch.einsum("td,edf->tef", tokens_TD, weights_EDD).tanh()
        chosen_TKD = all_TED.gather(1, experts_TK[:, :, None].expand(-1, -1, WIDTH))
        out_TD = (chosen_TKD * gates_TK[:, :, None]).sum(dim=1)
        out_TD.backward(grad_TD)
        outs.append(out_TD.detach())
    tokens, gates = ([each[index].grad for each in batches] for index in range(2))
    assert weights_EDD.grad is not None
    return outs, [x for x in tokens if x is not None], [x for x in gates if x is not None], weights_EDD.grad


@pytest.mark.parametrize("kind", ["flat", "threaded", "two_hop"])
def test_output_and_gradients_are_those_of_one_process(kind: str) -> None:
    outs, tokens, gates, experts = dense_twin()
    local = EXPERTS // RANKS
    for rank, result in enumerate(run_processes(RANKS, layer, kind)):
        expected = (outs[rank], tokens[rank], gates[rank], experts[rank * local :][:local])
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def crossed_groups(world: World) -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "rank"))
    with pytest.raises(ValueError, match="do not divide") as raised:
        ExpertGroups.from_process_groups(None, mesh.get_group("rank"), mesh.get_group("node"))
    return str(raised.value)


def test_groups_that_are_no_nodes_of_consecutive_ranks_are_refused() -> None:
    texts = run_processes(RANKS, crossed_groups)
    assert texts[0] == "rank 0: intra-node [0, 2], inter-node [0, 1] do not divide [0, 1, 2, 3] into consecutive nodes"
