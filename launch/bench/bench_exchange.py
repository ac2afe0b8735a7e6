"""`shoestring bench exchange`: bytes and times of each token dispatcher, compared with the minimum of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from ...comm.errors import ConfigError, Problem, raise_if_any
from ...comm.topology import LinkType
from ...comm.units import format_mega
from ..cluster.simulated_cluster import SimulatedCluster
from ..run.on_ranks import run_on_ranks
from .bench_exchange_rank import OPERATIONS, ExchangeBenchmarkSpec, run_exchange_benchmarks


def bench_exchange(spec: ExchangeBenchmarkSpec, uplink: str | None) -> dict[str, Any]:
    """Run the benchmark as processes of this machine, or with `uplink` on a simulated cluster; return the result.

    Raises `ConfigError` before any process exists.
    """
    raise_if_any(spec.problems())
    ranks = spec.topology.world_size
    if uplink is None:
        interfaces = None  # nodes that are only processes have no separate interfaces
        results = run_on_ranks(run_exchange_benchmarks, spec, ranks)
    else:
        with SimulatedCluster(nodes=spec.nodes, uplink=uplink) as cluster:
            results = run_on_ranks(run_exchange_benchmarks, spec, ranks, device="cpu", start=cluster.run_ranks)
            interfaces = cluster.total_bytes_sent()
    return results[0] | {"uplink": uplink, "inter_node_bytes_on_interfaces": interfaces}


def parse_name_list(text: str, option: str) -> tuple[str, ...]:
    """Parse a list such as `a,b`. Raises `ConfigError` for an empty list, or for a name that is repeated."""
    names = tuple(part.strip() for part in text.split(","))
    if len(set(names)) != len(names) or not all(names):
        raise ConfigError([Problem(option, text, "must be names separated by commas, each once")])
    return names


def benchmark_tables(result: Mapping[str, Any]) -> RenderableType:
    """Return the result as tables for the terminal."""
    spec, rows = result["spec"], result["rows"]
    parts: list[RenderableType] = [_headline(result), _bytes_table(rows), _time_table(result)]
    parts.append(_minimum_table(result))
    if result["inter_node_bytes_on_interfaces"] is not None:
        counted, seen = result["inter_node_bytes_counted"], result["inter_node_bytes_on_interfaces"]
        ratio = f"{seen / counted:.3f}" if counted else "-"
        total = f"{format_mega(counted, 3)} MB counted between nodes, {format_mega(seen, 3)} MB on the interfaces"
        parts.append(f"All passes: {total} (ratio {ratio})")
    if spec["overlap"]:
        parts.append(_overlap_table(rows))
    return Group(*parts)


def _headline(result: Mapping[str, Any]) -> str:
    spec = result["spec"]
    link = f", uplinks of {result['uplink']}" if result["uplink"] else " on one machine"
    grid = f"{spec['nodes']} nodes x {spec['gpus_per_node']} ranks on {result['device']}{link}"
    tokens = f"{spec['tokens']:,} BF16 tokens of {spec['hidden']:,} per rank"
    experts = (
        f"top {spec['top_k']} of {spec['experts']} experts, from {spec['top_k_groups']} of {spec['groups']} groups"
    )
    return f"{grid}\n{tokens}, {experts}; medians of {spec['repeats']} runs, slowest rank"


def _table(title: str, *headings: str) -> Table:
    """Create a table whose first column names the token dispatcher and the format of its rows."""
    table = Table(title=title, title_justify="left")
    table.add_column("token dispatcher")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _bytes_table(rows: list[Any]) -> Table:
    table = _table(
        "MB sent by all ranks, forward and backward: payload by link, and metadata",
        "loopback", "nvlink", "infiniband", "ids, gates", "sizes",
    )  # fmt: skip
    for row in rows:
        payload = [sum(row["bytes"][op]["payload"][link] for op in OPERATIONS) for link in LinkType]
        metadata = sum(sum(row["bytes"][op]["metadata"].values()) for op in OPERATIONS)
        sizes = sum(row["bytes"]["sizes"]["metadata"].values())
        table.add_row(_name(row), *(format_mega(size, 3) for size in (*payload, metadata, sizes)))
    return table


def _time_table(result: Mapping[str, Any]) -> Table:
    table = _table(
        "Milliseconds, and GB/s per node for the minimum payload between nodes",
        *(name.replace("_", " ") for name in OPERATIONS), "all four", "GB/s of dispatch",
    )  # fmt: skip
    nodes = result["spec"]["nodes"]
    for row in result["rows"]:
        seconds = [row["seconds"][name] for name in OPERATIONS]
        minimum = result["minimum_inter_node_bytes"][row["format"]]["once_per_node"] / nodes
        speed = f"{minimum / seconds[0] / 1e9:.4f}" if minimum else "-"
        table.add_row(_name(row), *(f"{1e3 * s:.1f}" for s in (*seconds, sum(seconds))), speed)
    return table


def _minimum_table(result: Mapping[str, Any]) -> Table:
    table = _table(
        "MB of payload between nodes, dispatch",
        "sent", "once per node (minimum)", "once per rank", "once per expert", "sent / minimum",
    )  # fmt: skip
    for row in result["rows"]:
        minimum = result["minimum_inter_node_bytes"][row["format"]]
        measured = row["bytes"]["dispatch"]["payload"][LinkType.INFINIBAND]
        ratio = f"{measured / minimum['once_per_node']:.3f}" if minimum["once_per_node"] else "-"
        bounds = [minimum[way] for way in ("once_per_node", "once_per_rank", "once_per_expert")]
        table.add_row(_name(row), *(format_mega(size, 3) for size in (measured, *bounds)), ratio)
    return table


def _overlap_table(rows: list[Any]) -> Table:
    table = _table(
        "Milliseconds of dispatches overlapped with computation",
        "dispatch only", "computation only", "overlapped", "overlapped / longer",
    )  # fmt: skip
    for row in rows:
        alone, computing, both = (
            row["overlap"][key] for key in ("exchange_seconds", "compute_seconds", "overlapped_seconds")
        )
        times = (f"{1e3 * s:.1f}" for s in (alone, computing, both))
        table.add_row(_name(row), *times, f"{both / max(alone, computing):.2f}")
    return table


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['exchange']} {row['format']}"
