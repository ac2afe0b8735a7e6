"""A rank of `shoestring bench exchange` counts the bytes that leave its node."""

from dataclasses import replace

import pytest

from shoestring.launch.bench.bench_exchange import bench_exchange, benchmark_answer
from shoestring.launch.cluster.simulated_cluster import namespace_problems
from shoestring.tests.launch.bench.small_exchange import SPEC
from shoestring.tests.launch.renderings import check_renderings


@pytest.mark.skipif(bool(list(namespace_problems())), reason="needs root, and namespaces")
def test_what_is_counted_is_what_leaves_the_nodes() -> None:
    result = bench_exchange(replace(SPEC, exchanges=("two_hop", "flat")), "10gbit")
    counted, seen = result["inter_node_bytes_counted"], result["inter_node_bytes_on_interfaces"]
    assert counted > 2_000_000
    assert counted <= seen <= 1.1 * counted
    for row in result["rows"]:
        sent, needed = (
            row["bytes"]["dispatch"]["payload"]["infiniband"],
            result["minimum_inter_node_bytes"][row["format"]],
        )
        assert sent == needed["once_per_node" if row["exchange"] == "two_hop" else "once_per_expert"]
        assert all(seconds > 0 for seconds in row["seconds"].values())
    # Four experts of one group, which is one node: one row per node is a quarter of one row per expert.
    assert (
        4 * result["minimum_inter_node_bytes"]["bf16"]["once_per_node"]
        == result["minimum_inter_node_bytes"]["bf16"]["once_per_expert"]
    )
    check_renderings(benchmark_answer(result), smallest_number_of_quantities=4 * (5 + 6 + 5))
