"""`shoestring bench exchange`: bytes and times of each token dispatcher, compared with the minimum of bytes."""

from collections.abc import Mapping
from typing import Any

from ...comm.errors import ConfigError, Problem, raise_if_any
from ...comm.topology import LinkType
from ...comm.units import format_mega
from ..answers.blocks import Answer, Block, Formats, Paragraph, records_table
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
            interfaces = sum(cluster.uplink_bytes_sent(node) for node in range(spec.nodes))
    return results[0] | {"uplink": uplink, "inter_node_bytes_on_interfaces": interfaces}


def parse_name_list(text: str, option: str) -> tuple[str, ...]:
    """Parse a list such as `a,b`. Raises `ConfigError` for an empty list, or for a name that is repeated."""
    names = tuple(part.strip() for part in text.split(","))
    if len(set(names)) != len(names) or not all(names):
        raise ConfigError([Problem(option, text, "must be names separated by commas, each once")])
    return names


def benchmark_answer(result: Mapping[str, Any]) -> Answer:
    """Return the result, with the sums and ratios of each row that its tables show."""
    figures = [_figures(result, row) for row in result["rows"]]
    rows = [row | {"figures": each} for row, each in zip(result["rows"], figures, strict=True)]
    tables = [records_table(title, _DISPATCHER | headings, figures, _FORMATS) for title, headings in _TABLES.items()]
    blocks: list[Block] = [Paragraph(_headline(result)), *tables]
    if result["inter_node_bytes_on_interfaces"] is not None:
        counted, seen = result["inter_node_bytes_counted"], result["inter_node_bytes_on_interfaces"]
        ratio = f"{seen / counted:.3f}" if counted else "-"
        total = f"{format_mega(counted, 3)} MB counted between nodes, {format_mega(seen, 3)} MB on the interfaces"
        blocks.append(Paragraph(f"All passes: {total} (ratio {ratio})"))
    if result["spec"]["overlap"]:
        title = "Milliseconds of dispatches overlapped with computation"
        blocks.append(records_table(title, _DISPATCHER | _OVERLAP, figures, _FORMATS))
    return Answer.from_blocks("Token dispatchers", {**result, "rows": rows}, blocks)


def _headline(result: Mapping[str, Any]) -> str:
    spec = result["spec"]
    link = f", uplinks of {result['uplink']}" if result["uplink"] else " on one machine"
    grid = f"{spec['nodes']} nodes x {spec['gpus_per_node']} ranks on {result['device']}{link}"
    tokens = f"{spec['tokens']:,} BF16 tokens of {spec['hidden']:,} per rank"
    experts = (
        f"top {spec['top_k']} of {spec['experts']} experts, from {spec['top_k_groups']} of {spec['groups']} groups"
    )
    return f"{grid}\n{tokens}, {experts}; medians of {spec['repeats']} runs, slowest rank"


_DISPATCHER = {"dispatcher": "token dispatcher"}
_TABLES = {
    "MB sent by all ranks, forward and backward: payload by link, and metadata": {
        **{f"{link}_bytes": link.value for link in LinkType},
        "metadata_bytes": "ids, gates",
        "size_bytes": "sizes",
    },
    "Milliseconds, and GB/s per node for the minimum payload between nodes": {
        **{f"{op}_seconds": op.replace("_", " ") for op in OPERATIONS},
        "total_seconds": "all four",
        "dispatch_bytes_per_second": "GB/s of dispatch",
    },
    "MB of payload between nodes, dispatch": {
        "sent_bytes": "sent",
        "once_per_node": "once per node (minimum)",
        "once_per_rank": "once per rank",
        "once_per_expert": "once per expert",
        "sent_over_minimum": "sent / minimum",
    },
}
"""Headings of each table by the key of `_figures`."""
_OVERLAP = {
    "exchange_seconds": "dispatch only",
    "compute_seconds": "computation only",
    "overlapped_seconds": "overlapped",
    "overlapped_over_longer": "overlapped / longer",
}


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


_FORMATS: Formats = {
    **{key: lambda size: format_mega(size, 3) for headings in _TABLES.values() for key in headings},
    **{f"{op}_seconds": _milliseconds for op in (*OPERATIONS, "total", "exchange", "compute", "overlapped")},
    "dispatch_bytes_per_second": lambda speed: f"{speed / 1e9:.4f}",
    "sent_over_minimum": "{:.3f}".format,
    "overlapped_over_longer": "{:.2f}".format,
}


def _figures(result: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the tables show of a row: bytes, seconds, and ratios, which are None without a denominator."""
    moved, seconds, minimum = row["bytes"], row["seconds"], result["minimum_inter_node_bytes"][row["format"]]
    least, sent = minimum["once_per_node"], moved["dispatch"]["payload"][LinkType.INFINIBAND]
    figures: dict[str, Any] = {
        "dispatcher": f"{row['exchange']} {row['format']}",
        **{f"{link}_bytes": sum(moved[op]["payload"][link] for op in OPERATIONS) for link in LinkType},
        "metadata_bytes": sum(sum(moved[op]["metadata"].values()) for op in OPERATIONS),
        "size_bytes": sum(moved["sizes"]["metadata"].values()),
        **{f"{op}_seconds": seconds[op] for op in OPERATIONS},
        "total_seconds": sum(seconds[op] for op in OPERATIONS),
        "dispatch_bytes_per_second": least / result["spec"]["nodes"] / seconds["dispatch"] if least else None,
        "sent_bytes": sent,
        **minimum,
        "sent_over_minimum": sent / least if least else None,
    }
    if result["spec"]["overlap"]:
        figures |= row["overlap"]
        longer = max(figures["exchange_seconds"], figures["compute_seconds"])
        figures["overlapped_over_longer"] = figures["overlapped_seconds"] / longer
    return figures
