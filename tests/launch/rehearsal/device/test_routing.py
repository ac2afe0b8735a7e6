"""Balanced routing: both ends of every message have the same size, and the parts add up."""

import pytest

from shoestring.launch.compose import compose_run_config
from shoestring.launch.rehearsal.device.routing import BalancedRouting

V3 = BalancedRouting.from_config(compose_run_config(["experiment=deepseek_v3_h800"]))
LAYOUTS = [
    V3,
    BalancedRouting(1, 1, 16, 128, 4, 1.0, 1.0),
    BalancedRouting(2, 1, 16, 128, 4, 1.65, 1.0),
    BalancedRouting(4, 2, 16, 129, 4, 2.3, 1.6),
    BalancedRouting(8, 4, 24, 37, 5, 3.9, 2.7),
    BalancedRouting(4, 4, 4, 3, 1, 1.0, 1.0),
]


@pytest.mark.parametrize("routing", LAYOUTS)
def test_flat(routing: BalancedRouting) -> None:
    ranks, rows = routing.ranks, routing.tokens * routing.top_k
    numbers = [routing.flat_exchange_sizes(rank) for rank in range(ranks)]
    for rank, own in enumerate(numbers):
        sent, received, by_expert, (of_ranks, of_nodes) = (
            own[:ranks],
            own[ranks : 2 * ranks],
            own[2 * ranks : -2],
            own[-2:],
        )
        assert sum(sent) == rows
        assert sum(received) == sum(by_expert)
        assert received == [other[rank] for other in numbers]
        assert len(by_expert) == routing.experts // ranks
        assert routing.tokens <= of_nodes <= of_ranks <= rows
    assert routing.rows_by_expert.max() <= routing.tokens


@pytest.mark.parametrize("routing", LAYOUTS)
def test_two_hop(routing: BalancedRouting) -> None:
    ranks, nodes = routing.ranks, routing.nodes
    size, local = ranks // nodes, routing.experts // ranks
    sizes = (nodes, nodes, size, size, local, 1)
    parts = []
    for rank in range(ranks):
        numbers = routing.two_hop_exchange_sizes(rank)
        assert len(numbers) == sum(sizes)
        parts.append([[numbers.pop(0) for _ in range(length)] for length in sizes])
    for rank, (to_nodes, from_nodes, to_ranks, from_ranks, by_expert, (visits,)) in enumerate(parts):
        node, place = divmod(rank, size)
        assert from_nodes == [parts[other * size + place][0][node] for other in range(nodes)]
        assert from_ranks == [parts[node * size + other][2][place] for other in range(size)]
        assert max(to_nodes) <= routing.tokens <= sum(to_nodes) <= visits
        assert sum(from_nodes) <= sum(to_ranks) <= routing.top_k * sum(from_nodes)
        assert sum(from_ranks) <= sum(by_expert) <= local * sum(from_ranks)
    assert sum(sum(part[4]) for part in parts) == ranks * routing.tokens * routing.top_k


def test_the_released_model_is_exactly_even() -> None:
    numbers = V3.two_hop_exchange_sizes(5)
    assert numbers[-5:-1] == [8192] * 4
    assert {sum(V3.flat_exchange_sizes(rank)[64:128]) for rank in range(64)} == {4096 * 8}
    assert numbers[-1] == 30144  # 4,096 tokens, each on 7.36 ranks
    assert sum(numbers[:8]) == pytest.approx(4096 * 3.629, abs=4)
