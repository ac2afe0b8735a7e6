"""`shoestring bench exchange`: refusals, and figures that agree with each other and with the wire."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.launch.bench.bench_exchange import bench_exchange, benchmark_tables, parse_name_list
from shoestring.launch.bench.bench_exchange_rank import ExchangeBenchmarkSpec
from shoestring.launch.cluster.namespaces import namespace_problems

SPEC = ExchangeBenchmarkSpec(
    nodes=2,
    gpus_per_node=1,
    hidden=512,
    tokens=256,
    experts=8,
    top_k=4,
    groups=2,
    top_k_groups=1,
    exchanges=("flat", "two_hop"),
    formats=("bf16", "fp8"),
    repeats=1,
    overlap=False,
)


@pytest.mark.parametrize(
    ("changes", "field", "gist"),
    [
        ({"nodes": 0}, "nodes", "at least 1"),
        ({"experts": 9}, "experts", "multiple of the 2 ranks"),
        ({"groups": 8, "top_k_groups": 9}, "top_k_groups", "at most groups = 8"),
        ({"top_k": 5}, "top_k", "at most 4"),
        ({"exchanges": ("round",)}, "exchanges", "flat, two_hop, deepep"),
        ({"exchanges": ("deepep",)}, "exchanges", "Hopper"),
        ({"formats": ("fp4",)}, "formats", "bf16, fp8"),
    ],
)
def test_refusals(changes: dict[str, object], field: str, gist: str) -> None:
    with pytest.raises(ConfigError) as refused:
        bench_exchange(replace(SPEC, **changes), None)  # type: ignore[arg-type]
    assert any(problem.field == field and gist in problem.hint for problem in refused.value.problems)


@pytest.mark.parametrize("text", ["", "flat,", "flat,flat"])
def test_names_are_read(text: str) -> None:
    assert parse_name_list("flat, two_hop", "--exchanges") == ("flat", "two_hop")
    with pytest.raises(ConfigError):
        parse_name_list(text, "--exchanges")


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
