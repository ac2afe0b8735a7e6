"""The flat exchange against its definition: rows by expert, and sums over the experts of each token."""

import pytest
import torch
from torch import Tensor

from shoestring.comm.exchange.api import TokenExchange
from shoestring.comm.exchange.config import ExchangeConfig
from shoestring.comm.topology import Topology
from shoestring.comm.traffic import TrafficCounter, TrafficKind
from shoestring.tests.comm.exchange.routing import EXPERTS, LABEL, open_on
from shoestring.tests.processes import World, run_processes

TOP_K, WIDTH = 2, 3


def tokens_of(rank: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, gate weights and distinct experts of one rank."""
    generator = torch.Generator().manual_seed(rank)
    tokens_TD = torch.randn(count, WIDTH, dtype=torch.float64, generator=generator)
    weights_TK = torch.rand(count, TOP_K, generator=generator)
    experts_TK = torch.rand(count, EXPERTS, generator=generator).topk(TOP_K).indices
    return tokens_TD, weights_TK, experts_TK


def exchange_of(ranks: int, rank: int) -> tuple[TokenExchange[object], TrafficCounter]:
    exchange, traffic, _ = open_on(Topology(ep=ranks, gpus_per_node=2), rank, ExchangeConfig())
    return exchange, traffic


def round_trip(world: World, counts: list[int]) -> dict[str, Tensor]:
    """Return one round trip: expert_number * row comes back; the backward sends token gradients and doubles them."""
    exchange, _ = exchange_of(world.size, world.rank)
    tokens_TD, weights_TK, experts_TK = tokens_of(world.rank, counts[world.rank])
    received = exchange.dispatch(tokens_TD, weights_TK, experts_TK, LABEL).wait()
    local = EXPERTS // world.size
    numbers = torch.arange(world.rank * local, (world.rank + 1) * local)
    expert_of_row_R = numbers.repeat_interleave(torch.tensor(received.rows_per_expert_L))
    combined_TD = exchange.combine(received.rows_RD * expert_of_row_R[:, None], received).wait()
    grad_RD = exchange.combine_backward(tokens_TD, received).wait()
    assert torch.equal(grad_RD, received.rows_RD)  # the same layout, the same rows
    grad_TD, grad_weights_TK = exchange.dispatch_backward(2 * grad_RD, received.gate_weights_R, received).wait()
    return {
        "rows": received.rows_RD,
        "combined": combined_TD,
        "grad": grad_TD,
        "grad_weights": grad_weights_TK,
    }


@pytest.mark.parametrize("counts", [[5], [4, 7], [3, 0, 6, 2], [0, 0]], ids=str)
def test_every_copy_arrives_once_and_comes_back(counts: list[int]) -> None:
    results = run_processes(len(counts), round_trip, counts)
    local = EXPERTS // len(counts)
    everyone = [tokens_of(rank, count) for rank, count in enumerate(counts)]
    for rank, result in enumerate(results):
        expected = [
            tokens_TD[(experts_TK == expert).any(dim=1)]
            for expert in range(rank * local, (rank + 1) * local)
            for tokens_TD, _, experts_TK in everyone
        ]
        assert torch.equal(result["rows"], torch.cat(expected))  # by expert, then by source rank
        tokens_TD, weights_TK, experts_TK = everyone[rank]
        factor_T1 = experts_TK.sum(dim=1, keepdim=True)
        torch.testing.assert_close(result["combined"], tokens_TD * factor_T1)
        torch.testing.assert_close(result["grad"], 2 * TOP_K * tokens_TD)
        assert torch.equal(result["grad_weights"], weights_TK)


def bytes_sent(world: World) -> tuple[dict[str, int], dict[str, int], tuple[int, ...]]:
    exchange, traffic = exchange_of(world.size, world.rank)
    tokens_TD, weights_TK, _ = tokens_of(world.rank, 4)
    experts_TK = torch.tensor([[0, EXPERTS - 1]] * 4)  # ranks 0 and 3 of four
    received = exchange.dispatch(tokens_TD, weights_TK, experts_TK, LABEL).wait()
    payload, metadata = (
        {str(link): size for link, size in traffic.bytes_by_link(kind).items()} for kind in TrafficKind
    )
    return payload, metadata, received.token_counts.as_tuple()


def test_bytes_are_counted_by_kind_and_link() -> None:
    row, gate = WIDTH * 8, 4  # a row in FP64 and its FP32 weight
    sizes = EXPERTS // 4 * 8  # int64 counts for each rank
    first, second, *_ = run_processes(4, bytes_sent)
    assert first[0] == {"loopback": 4 * row, "nvlink": 0, "infiniband": 4 * row}
    assert first[1] == {"loopback": 4 * gate + sizes, "nvlink": sizes, "infiniband": 4 * gate + 2 * sizes}
    assert second[0] == {"loopback": 0, "nvlink": 4 * row, "infiniband": 4 * row}
    assert second[1] == {"loopback": sizes, "nvlink": 4 * gate + sizes, "infiniband": 4 * gate + 2 * sizes}
    assert first[2] == second[2] == (4, 8, 8, 8)  # tokens, and the experts, ranks and nodes they visit
