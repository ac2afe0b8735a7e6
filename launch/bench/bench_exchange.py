"""`shoestring bench exchange`: what each token exchange sends and how long it takes, beside the least it could send."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from ...comm.errors import ConfigError, Problem, raise_if_any
from ...comm.topology import LinkType
from ..cluster.simulated_cluster import SimulatedCluster
from ..run.rank_environment import build_rank_environment
from ..run.torchrun import TORCHRUN_COMMAND, run_local_ranks, wait_for_torchruns
from .bench_exchange_rank import OPERATIONS, ExchangeBenchmarkSpec

_MODULE = "shoestring.launch.bench.bench_exchange_rank"
_SECONDS = 600


def bench_exchange(spec: ExchangeBenchmarkSpec, uplink: str | None) -> dict[str, Any]:
    """Run it on this machine: as so many processes, or with `uplink` on a simulated cluster of so many nodes.

    Raises `ConfigError` before any process exists.
    """
    raise_if_any(spec.problems())
    spec = replace(spec, on_cpu=uplink is not None)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        arguments = ["-m", _MODULE, json.dumps(asdict(spec)), str(output)]
        if uplink is None:
            interfaces = None  # processes that are called nodes have none of their own
            run_local_ranks(arguments, spec.topology.world_size, _SECONDS)
        else:
            interfaces = run_ranks_on_simulated_cluster(spec.nodes, spec.gpus_per_node, uplink, arguments)
        result: dict[str, Any] = json.loads(output.read_text())
    return result | {"uplink": uplink, "sent_by_interfaces": interfaces}


def run_ranks_on_simulated_cluster(nodes: int, gpus_per_node: int, uplink: str, arguments: Sequence[str]) -> int:
    """Run `python <arguments>` as so many ranks on each of some simulated nodes.

    Returns the bytes that left the nodes through their interfaces, headers included.
    """
    with SimulatedCluster(nodes=nodes, uplink=uplink) as cluster:
        processes = []
        for node in range(nodes):
            place = cluster.node_environment(node)
            meeting = [f"--master-addr={place['MASTER_ADDR']}", f"--master-port={place['MASTER_PORT']}"]
            torchrun = [f"--nnodes={nodes}", f"--node-rank={node}", f"--nproc-per-node={gpus_per_node}", *meeting]
            processes.append(
                cluster.start_process(node, [*TORCHRUN_COMMAND, *torchrun, *arguments], build_rank_environment())
            )
        wait_for_torchruns(processes, _SECONDS)
        return sum(cluster.uplink_bytes_sent(node) for node in range(nodes))


def parse_name_list(text: str, option: str) -> tuple[str, ...]:
    """From `a,b`. Raises `ConfigError` for nothing, or for a name that comes twice."""
    names = tuple(part.strip() for part in text.split(","))
    if len(set(names)) != len(names) or not all(names):
        raise ConfigError([Problem(option, text, "must be names with commas between, each once")])
    return names


def benchmark_tables(result: Mapping[str, Any]) -> RenderableType:
    """The figures for a reader."""
    spec, rows = result["spec"], result["rows"]
    parts: list[RenderableType] = [_headline(result), _bytes_table(rows), _time_table(result)]
    parts.append(_needed_table(result))
    if result["sent_by_interfaces"] is not None:
        counted, seen = result["sent_between_nodes"], result["sent_by_interfaces"]
        ratio = f"{seen / counted:.3f}" if counted else "-"
        parts.append(f"All passes: {_mb(counted)} MB counted between nodes, {_mb(seen)} MB on the wires: {ratio}")
    if spec["overlap"]:
        parts.append(_overlap_table(rows))
    return Group(*parts)


def _headline(result: Mapping[str, Any]) -> str:
    spec = result["spec"]
    link = f", uplinks of {result['uplink']}" if result["uplink"] else " on one machine"
    where = f"{spec['nodes']} nodes x {spec['gpus_per_node']} ranks on {result['device']}{link}"
    groups = f"{spec['groups']} groups, at most {spec['top_k_groups']} of them"
    what = (
        f"{spec['tokens']:,} BF16 tokens of {spec['hidden']:,} a rank, top {spec['top_k']} of {spec['experts']} experts"
    )
    return f"{where}\n{what} in {groups}; medians of {spec['repeats']} runs, the slowest rank's time"


def _table(title: str, *headings: str) -> Table:
    """The first column says which exchange, and in which format rows go to their experts."""
    table = Table(title=title, title_justify="left")
    table.add_column("exchange")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _bytes_table(rows: list[Any]) -> Table:
    table = _table(
        "MB sent by all ranks, forward and backward: payload by link, and what travels beside it",
        "loopback", "nvlink", "infiniband", "ids, gates", "sizes",
    )  # fmt: skip
    for row in rows:
        payload = [sum(row["bytes"][op]["payload"][link] for op in OPERATIONS) for link in LinkType]
        beside = sum(sum(row["bytes"][op]["metadata"].values()) for op in OPERATIONS)
        sizes = sum(row["bytes"]["sizes"]["metadata"].values())
        table.add_row(_name(row), *(_mb(size) for size in (*payload, beside, sizes)))
    return table


def _time_table(result: Mapping[str, Any]) -> Table:
    table = _table(
        "Milliseconds, and GB/s a node of the least payload between nodes",
        *(name.replace("_", " ") for name in OPERATIONS), "all four", "GB/s of dispatch",
    )  # fmt: skip
    nodes = result["spec"]["nodes"]
    for row in result["rows"]:
        seconds = [row["seconds"][name] for name in OPERATIONS]
        least = result["needed"][row["format"]]["node"] / nodes
        speed = f"{least / seconds[0] / 1e9:.4f}" if least else "-"
        table.add_row(_name(row), *(f"{1e3 * s:.1f}" for s in (*seconds, sum(seconds))), speed)
    return table


def _needed_table(result: Mapping[str, Any]) -> Table:
    table = _table(
        "MB of payload between nodes, dispatch",
        "sent", "row a node (least)", "row a rank", "row an expert", "sent / least",
    )  # fmt: skip
    for row in result["rows"]:
        needed = result["needed"][row["format"]]
        measured = row["bytes"]["dispatch"]["payload"][LinkType.INFINIBAND]
        ratio = f"{measured / needed['node']:.3f}" if needed["node"] else "-"
        ways = [needed[way] for way in ("node", "rank", "expert")]
        table.add_row(_name(row), *(_mb(size) for size in (measured, *ways)), ratio)
    return table


def _overlap_table(rows: list[Any]) -> Table:
    table = _table(
        "Milliseconds of dispatches with computing beside them",
        "exchange alone", "compute alone", "both", "both / longer",
    )  # fmt: skip
    for row in rows:
        alone, computing, both = (row["overlap"][key] for key in ("exchange", "compute", "both"))
        times = (f"{1e3 * s:.1f}" for s in (alone, computing, both))
        table.add_row(_name(row), *times, f"{both / max(alone, computing):.2f}")
    return table


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['exchange']} {row['format']}"


def _mb(size: float) -> str:
    return f"{size / 1e6:.3f}"
