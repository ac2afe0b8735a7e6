"""`shoestring bench exchange`: bytes and times of each token dispatcher, compared with the minimum of bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ...comm.errors import ConfigError, Problem, raise_if_any
from ...comm.topology import LinkType
from ...comm.units import format_mega
from ..answers.blocks import Answer, Block, Cell, Paragraph, Quantity, TableBlock, number, table
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


def benchmark_answer(result: Mapping[str, Any]) -> Answer:
    """Return the result, with the sums and ratios of each row that its tables show."""
    rows = [row | {"sums": _sums(result, row)} for row in result["rows"]]
    blocks: list[Block] = [Paragraph(_headline(result)), *_tables(rows)]
    data: dict[str, Any] = {**result, "rows": rows}
    if result["inter_node_bytes_on_interfaces"] is not None:
        counted, seen = result["inter_node_bytes_counted"], result["inter_node_bytes_on_interfaces"]
        ratio = f"{seen / counted:.3f}" if counted else "-"
        total = f"{format_mega(counted, 3)} MB counted between nodes, {format_mega(seen, 3)} MB on the interfaces"
        blocks.append(Paragraph(f"All passes: {total} (ratio {ratio})"))
    if result["spec"]["overlap"]:
        blocks.append(_overlap_table(rows))
    return Answer.from_blocks("Token dispatchers", data, blocks)


def _sums(result: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the tables show of a row beside the measured figures; ratios without a denominator are None."""
    counts, seconds = row["bytes"], row["seconds"]
    minimum = result["minimum_inter_node_bytes"][row["format"]]
    least, sent = minimum["once_per_node"], counts["dispatch"]["payload"][LinkType.INFINIBAND]
    sums = {
        "payload_bytes": {link: sum(counts[op]["payload"][link] for op in OPERATIONS) for link in LinkType},
        "metadata_bytes": sum(sum(counts[op]["metadata"].values()) for op in OPERATIONS),
        "size_bytes": sum(counts["sizes"]["metadata"].values()),
        "seconds": sum(seconds[op] for op in OPERATIONS),
        "dispatch_bytes_per_second": least / result["spec"]["nodes"] / seconds[OPERATIONS[0]] if least else None,
        "inter_node_dispatch_bytes": sent,
        "minimum_inter_node_bytes": minimum,
        "sent_over_minimum": sent / least if least else None,
    }
    if result["spec"]["overlap"]:
        times = row["overlap"]
        sums["overlapped_over_longer"] = times["overlapped_seconds"] / max(
            times["exchange_seconds"], times["compute_seconds"]
        )
    return sums


def _headline(result: Mapping[str, Any]) -> str:
    spec = result["spec"]
    link = f", uplinks of {result['uplink']}" if result["uplink"] else " on one machine"
    grid = f"{spec['nodes']} nodes x {spec['gpus_per_node']} ranks on {result['device']}{link}"
    tokens = f"{spec['tokens']:,} BF16 tokens of {spec['hidden']:,} per rank"
    experts = (
        f"top {spec['top_k']} of {spec['experts']} experts, from {spec['top_k_groups']} of {spec['groups']} groups"
    )
    return f"{grid}\n{tokens}, {experts}; medians of {spec['repeats']} runs, slowest rank"


def _tables(rows: Sequence[Mapping[str, Any]]) -> Iterator[TableBlock]:
    """Yield bytes by link, times, and the bytes between nodes beside their minimum."""
    yield _table(
        rows,
        "MB sent by all ranks, forward and backward: payload by link, and metadata",
        ("loopback", "nvlink", "infiniband", "ids, gates", "sizes"),
        lambda row, sums: map(_mega, (*sums["payload_bytes"].values(), sums["metadata_bytes"], sums["size_bytes"])),
    )
    yield _table(
        rows,
        "Milliseconds, and GB/s per node for the minimum payload between nodes",
        (*(name.replace("_", " ") for name in OPERATIONS), "all four", "GB/s of dispatch"),
        lambda row, sums: (
            *map(_milliseconds, (*(row["seconds"][name] for name in OPERATIONS), sums["seconds"])),
            _or_dash(sums["dispatch_bytes_per_second"], ".4f", 1e-9),
        ),
    )
    bounds = ("once_per_node", "once_per_rank", "once_per_expert")
    yield _table(
        rows,
        "MB of payload between nodes, dispatch",
        ("sent", "once per node (minimum)", "once per rank", "once per expert", "sent / minimum"),
        lambda row, sums: (
            *map(_mega, (sums["inter_node_dispatch_bytes"], *map(sums["minimum_inter_node_bytes"].get, bounds))),
            _or_dash(sums["sent_over_minimum"], ".3f"),
        ),
    )


def _overlap_table(rows: Sequence[Mapping[str, Any]]) -> TableBlock:
    measured = ("exchange_seconds", "compute_seconds", "overlapped_seconds")
    return _table(
        rows,
        "Milliseconds of dispatches overlapped with computation",
        ("dispatch only", "computation only", "overlapped", "overlapped / longer"),
        lambda row, sums: (
            *map(_milliseconds, map(row["overlap"].get, measured)),
            number(sums["overlapped_over_longer"], ".2f"),
        ),
    )


def _table(
    rows: Sequence[Mapping[str, Any]],
    title: str,
    headings: Sequence[str],
    cells: Callable[[Mapping[str, Any], Mapping[str, Any]], Iterable[Cell]],
) -> TableBlock:
    """Return a table whose first column names the token dispatcher and the format of its rows."""
    lines = [(f"{row['exchange']} {row['format']}", *cells(row, row["sums"])) for row in rows]
    return table(title, ("token dispatcher", *headings), lines)


def _mega(size: int) -> Quantity:
    return Quantity(size, format_mega(size, 3))


def _milliseconds(seconds: float) -> Quantity:
    return number(seconds, ".1f", scale=1e3)


def _or_dash(value: float | None, spec: str, scale: float = 1.0) -> Cell:
    return "-" if value is None else number(value, spec, scale=scale)
