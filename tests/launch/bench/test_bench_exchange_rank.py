"""What a rank of `shoestring bench exchange` counts is what leaves its node."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoestring.launch.bench.bench_exchange import bench_exchange, benchmark_tables
from shoestring.launch.cluster.namespaces import namespace_problems
from shoestring.tests.launch.bench.small_exchange import SPEC


@pytest.mark.skipif(bool(list(namespace_problems())), reason="needs root, and namespaces")
def test_what_is_counted_is_what_leaves_the_nodes() -> None:
    result = bench_exchange(replace(SPEC, exchanges=("two_hop", "flat")), "10gbit")
    counted, seen = result["sent_between_nodes"], result["sent_by_interfaces"]
    assert counted > 2_000_000
    assert counted <= seen <= 1.1 * counted
    for row in result["rows"]:
        sent, needed = row["bytes"]["dispatch"]["payload"]["infiniband"], result["needed"][row["format"]]
        assert sent == needed["node" if row["exchange"] == "two_hop" else "expert"]
        assert all(seconds > 0 for seconds in row["seconds"].values())
    # Four experts of one group, which is one node: a row a node is a quarter of a row an expert.
    assert 4 * result["needed"]["bf16"]["node"] == result["needed"]["bf16"]["expert"]
    assert benchmark_tables(result)
