"""The result of a rehearsal as text, tables and plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table

from ...comm.units import format_giga
from .checks import MAX_GROUP_CREATIONS, MAX_WORLD_COLLECTIVES, peak_memory_relative_error
from .findings import format_ranks
from .launch_counts import DENSE_LAYER, MOE_LAYER, MTP_MODULE, WHOLE_STEP, MeanKernelLaunches, has_weight_gradients
from .result import RehearsalResult, count_collectives, count_p2p_batches, step_host_waits


def rehearsal_to_dict(result: RehearsalResult) -> dict[str, Any]:
    """Return the whole result as plain values; sizes in bytes, times in seconds."""
    shared, messages = result.compared_counts
    return {
        "findings": [asdict(finding) for finding in result.findings],
        "mismatches": result.mismatch_count,
        "compared_counts": {"collectives": shared, "p2p_ops": messages},
        "deadlock_check": "not run" if result.failed_ranks else "run",
        "assumptions": list(result.assumptions),
        "limits": {"max_group_creations": MAX_GROUP_CREATIONS, "max_world_collectives": MAX_WORLD_COLLECTIVES},
        "ranks": _rank_trees(result),
        "host_waits": [asdict(each) for each in result.host_wait_summaries],
        "phases": [_count_tree(count) for count in result.launches_by_phase],
        "moe_layer_totals": {
            stream: {"launches": launches, "bytes": size}
            for stream, (launches, size) in result.moe_layer_totals.items()
        },
        "moe_layer_totals_have_weight_gradients": has_weight_gradients(result.launches_by_phase),
        "top_operations": [asdict(count) for count in result.launches_by_operation],
    }


def _rank_trees(result: RehearsalResult) -> list[dict[str, Any]]:
    return [
        {
            "rank": log.rank,
            "pp_rank": log.pp_rank,
            "micro_batches": log.micro_batches,
            "operations": log.operations,
            "collectives": count_collectives(log),
            "p2p_batches": count_p2p_batches(log),
            "host_waits": sum(1 for _ in step_host_waits(log)),
            "group_creations": log.group_creations,
            "memory": asdict(log.memory),
            "peak_relative_error": peak_memory_relative_error(log),
            "rehearsal_seconds": log.seconds,
        }
        for log in result.logs
    ]


def _count_tree(count: MeanKernelLaunches) -> dict[str, Any]:
    names = ("owner", "phase", "stream", "launches", "bytes")
    return {name: getattr(count, name) for name in names}


def rehearsal_tables(result: RehearsalResult, operations: int) -> tuple[str, RenderableType]:
    """Return the summary, and the tables behind it with the `operations` largest operations of an MoE layer."""
    parts = [_ranks(result), _peak_memory(result), _host_waits(result), _memory_by_phase(result), _phases(result)]
    if operations:
        parts.append(_operations(result, operations))
    return "\n".join(rehearsal_summary_lines(result)), Group(*parts)


def rehearsal_summary_lines(result: RehearsalResult) -> list[str]:
    """Return the lines of the summary: findings, comparisons and assumptions."""
    first, shared = result.logs[0], result.compared_counts
    ranks = f"{len(result.logs)} of {first.world_size} ranks, {first.micro_batches} micro-batches"
    count = len(result.findings)
    found = f"{count} finding{'s' if count > 1 else ''}" if count else "no findings"
    lines = [f"{found}: {ranks}", *map(str, result.findings)]
    lines.append(
        f"{result.mismatch_count} mismatches in {shared[0]:,} collectives and {shared[1]:,} messages between"
        " rehearsed ranks"
    )
    if result.failed_ranks:
        lines.append(f"deadlock check: not run, because the step of {format_ranks(result.failed_ranks)} failed")
    return lines + [f"assumed: {text}" for text in result.assumptions]


def _ranks(result: RehearsalResult) -> Table:
    table = _table("Rehearsed ranks")
    for heading in ("rank", "pp", "operations", "collectives", "P2P batches", "host waits", "groups", "s"):
        table.add_column(heading, justify="right")
    for log in result.logs:
        counts = (
            log.operations,
            count_collectives(log),
            count_p2p_batches(log),
            sum(1 for _ in step_host_waits(log)),
            log.group_creations,
        )
        table.add_row(str(log.rank), str(log.pp_rank), *(f"{count:,}" for count in counts), f"{log.seconds:.1f}")
    return table


def _peak_memory(result: RehearsalResult) -> Table:
    table = _table("Peak of live tensors, GB, and the prediction of `memory`")
    for heading in ("rank", "peak", "phase", "predicted", "difference", "GPU capacity"):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    for log in result.logs:
        memory = log.memory
        room = "-" if memory.capacity_bytes is None else _gigabytes(memory.capacity_bytes)
        sizes = (
            _gigabytes(memory.peak_bytes),
            memory.peak_phase,
            _gigabytes(memory.predicted_peak_bytes),
            f"{peak_memory_relative_error(log):+.1%}",
            room,
        )
        table.add_row(str(log.rank), *sizes)
    return table


def _host_waits(result: RehearsalResult) -> Table:
    table = _table("Waits of the host for the device")
    table.add_column("code location", overflow="fold")
    for heading in ("reason", "in FB", "max per rank", "all ranks"):
        table.add_column(heading, justify="left" if heading in ("reason", "in FB") else "right")
    for each in result.host_wait_summaries:
        inside = "yes" if each.is_inside_fb else "no"
        table.add_row(each.code_line, each.reason, inside, f"{each.max_per_rank:,}", f"{each.count:,}")
    return table


def _memory_by_phase(result: RehearsalResult) -> Table:
    table = _table("Live tensors by phase, GB")
    for heading in ("phase", "peak", "rank"):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    built = max(result.logs, key=lambda log: log.memory.peak_while_building_bytes)
    table.add_row(
        "building model and optimizer",
        _gigabytes(built.memory.peak_while_building_bytes),
        str(built.rank),
        end_section=True,
    )
    for phase, (size, rank) in result.peak_bytes_by_phase.items():
        table.add_row(phase, _gigabytes(size), str(rank))
    return table


def _phases(result: RehearsalResult) -> Table:
    table = _table("Kernel launches and GB moved, per layer and micro-batch or per step")
    for heading in ("module", "phase", "stream", "launches", "GB"):
        table.add_column(heading, justify="left" if heading in ("module", "phase", "stream") else "right")
    counts = sorted(result.launches_by_phase, key=lambda count: (_ORDER.index(count.owner), count.stream, -count.bytes))
    for _, same in groupby(counts, key=lambda count: (count.owner, count.stream)):
        for count in same:
            _add_count(table, count, (count.owner, count.phase, count.stream))
        table.add_section()
    pair = result.moe_layer_totals
    if len(pair) > 1:
        pair = {**pair, "all": (sum(launches for launches, _ in pair.values()), sum(size for _, size in pair.values()))}
    is_complete = has_weight_gradients(result.launches_by_phase)  # needs a rehearsed rank that holds only MoE layers
    phases = "forward + backward" if is_complete else "without weight gradients"
    for stream, (launches, size) in pair.items():
        table.add_row(f"{MOE_LAYER}, total", phases, stream, f"{launches:,.1f}", _gigabytes(size))
    return table


_ORDER = (MOE_LAYER, DENSE_LAYER, MTP_MODULE, WHOLE_STEP)


def _operations(result: RehearsalResult, number: int) -> Table:
    table = _table(f"Operations of a {MOE_LAYER} in one micro-batch that move the most bytes")
    for heading in ("operation", "phase", "stream", "code location", "launches", "GB"):
        justify: JustifyMethod = "right" if heading in ("launches", "GB") else "left"
        table.add_column(heading, justify=justify, overflow="fold")
    for count in [each for each in result.launches_by_operation if each.owner == MOE_LAYER][:number]:
        _add_count(table, count, (count.operation, count.phase, count.stream, count.code_location))
    return table


def _add_count(table: Table, count: MeanKernelLaunches, cells: Sequence[str]) -> None:
    table.add_row(*cells, f"{count.launches:,.1f}", _gigabytes(count.bytes))


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left")


def _gigabytes(size: float) -> str:
    return format_giga(size, 3 if size < 1e9 else 2)
