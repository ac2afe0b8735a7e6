"""The verdict as text and tables, and as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table

from .checks import MAX_GROUP_CREATIONS, MAX_WORLD_COLLECTIVES, peak_memory_relative_error
from .findings import format_ranks
from .launch_counts import DENSE_LAYER, MOE_LAYER, MTP_MODULE, WHOLE_STEP, MeanKernelLaunches, has_weight_gradients
from .result import RehearsalResult, count_collectives, count_p2p_batches, step_host_waits


def rehearsal_to_dict(verdict: RehearsalResult) -> dict[str, Any]:
    """Everything as plain values; sizes in bytes, times in seconds."""
    shared, messages = verdict.compared_counts
    return {
        "findings": [asdict(fault) for fault in verdict.findings],
        "mismatches": verdict.mismatch_count,
        "compared": {"collectives": shared, "messages": messages},
        "connection_model": "not run" if verdict.failed_ranks else "run",
        "assumptions": list(verdict.assumptions),
        "limits": {"group_creations": MAX_GROUP_CREATIONS, "world_reductions": MAX_WORLD_COLLECTIVES},
        "ranks": _rank_trees(verdict),
        "host_waits": [asdict(each) for each in verdict.host_wait_summaries],
        "phases": [_count_tree(count) for count in verdict.launches_by_phase],
        "layer_pair": {
            stream: {"launches": launches, "bytes": size}
            for stream, (launches, size) in verdict.moe_layer_totals.items()
        },
        "layer_pair_has_weight_gradients": has_weight_gradients(verdict.launches_by_phase),
        "passes": [asdict(count) for count in verdict.launches_by_operation],
    }


def _rank_trees(verdict: RehearsalResult) -> list[dict[str, Any]]:
    return [
        {
            "rank": log.rank,
            "pp_rank": log.pp_rank,
            "micro_batches": log.micro_batches,
            "operations": log.operations,
            "collectives": count_collectives(log),
            "batches": count_p2p_batches(log),
            "host_waits": sum(1 for _ in step_host_waits(log)),
            "group_creations": log.group_creations,
            "memory": asdict(log.memory),
            "peak_above_prediction": peak_memory_relative_error(log),
            "seconds": log.seconds,
        }
        for log in verdict.logs
    ]


def _count_tree(count: MeanKernelLaunches) -> dict[str, Any]:
    names = ("of", "phase", "stream", "launches", "bytes")
    return {name: getattr(count, name) for name in names}


def rehearsal_tables(verdict: RehearsalResult, operations: int) -> tuple[str, RenderableType]:
    """The verdict first; then what it stands on. `passes` operations of a MoE layer are listed."""
    parts = [_ranks(verdict), _peaks(verdict), _host_waits(verdict), _memory(verdict), _phases(verdict)]
    if operations:
        parts.append(_passes(verdict, operations))
    return "\n".join(rehearsal_summary_lines(verdict)), Group(*parts)


def rehearsal_summary_lines(verdict: RehearsalResult) -> list[str]:
    """Return the findings, or that there are none; what was compared; and what was assumed."""
    first, shared = verdict.logs[0], verdict.compared_counts
    ranks = f"{len(verdict.logs)} of {first.world_size} ranks, {first.micro_batches} micro-batches"
    count = len(verdict.findings)
    found = f"{count} finding{'s' if count > 1 else ''}" if count else "no findings"
    lines = [f"{found}: {ranks}", *map(str, verdict.findings)]
    lines.append(
        f"{verdict.mismatch_count} mismatches in {shared[0]:,} collectives and {shared[1]:,} messages that rehearsed ranks"
        " have in common"
    )
    if verdict.failed_ranks:
        lines.append(
            f"connection model: not run, for the step of {format_ranks(verdict.failed_ranks)} ends by its error"
        )
    return lines + [f"assumed: {text}" for text in verdict.assumptions]


def _ranks(verdict: RehearsalResult) -> Table:
    table = _table("Rehearsed ranks")
    for heading in ("rank", "pp", "operations", "collectives", "batches", "host waits", "groups", "s"):
        table.add_column(heading, justify="right")
    for log in verdict.logs:
        counts = (
            log.operations,
            count_collectives(log),
            count_p2p_batches(log),
            sum(1 for _ in step_host_waits(log)),
            log.group_creations,
        )
        table.add_row(str(log.rank), str(log.pp_rank), *(f"{count:,}" for count in counts), f"{log.seconds:.1f}")
    return table


def _peaks(verdict: RehearsalResult) -> Table:
    table = _table("Peak of live tensors, GB, beside what `memory` predicts")
    for heading in ("rank", "peak", "in", "predicted", "difference", "the GPU has"):
        table.add_column(heading, justify="left" if heading == "in" else "right")
    for log in verdict.logs:
        memory = log.memory
        room = "-" if memory.capacity is None else _giga(memory.capacity)
        sizes = (
            _giga(memory.peak),
            memory.peak_phase,
            _giga(memory.predicted),
            f"{peak_memory_relative_error(log):+.1%}",
            room,
        )
        table.add_row(str(log.rank), *sizes)
    return table


def _host_waits(verdict: RehearsalResult) -> Table:
    table = _table("Where the host waits for the device")
    table.add_column("place", overflow="fold")
    for heading in ("why", "in FB", "most per rank", "all ranks"):
        table.add_column(heading, justify="left" if heading in ("why", "in FB") else "right")
    for each in verdict.host_wait_summaries:
        inside = "yes" if each.is_inside_pair else "no"
        table.add_row(each.line, each.reason, inside, f"{each.most:,}", f"{each.times:,}")
    return table


def _memory(verdict: RehearsalResult) -> Table:
    table = _table("Live tensors by phase, GB")
    for heading in ("phase", "most", "rank"):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    built = max(verdict.logs, key=lambda log: log.memory.building)
    table.add_row("model and optimizer are made", _giga(built.memory.building), str(built.rank), end_section=True)
    for phase, (size, rank) in verdict.peak_bytes_by_phase.items():
        table.add_row(phase, _giga(size), str(rank))
    return table


def _phases(verdict: RehearsalResult) -> Table:
    table = _table("Launches and GB moved, of a layer in one micro-batch or of a step")
    for heading in ("of", "phase", "stream", "launches", "GB"):
        table.add_column(heading, justify="left" if heading in ("of", "phase", "stream") else "right")
    counts = sorted(verdict.launches_by_phase, key=lambda count: (_ORDER.index(count.of), count.stream, -count.bytes))
    for _, same in groupby(counts, key=lambda count: (count.of, count.stream)):
        for count in same:
            _add_count(table, count, (count.of, count.phase, count.stream))
        table.add_section()
    pair = verdict.moe_layer_totals
    if len(pair) > 1:
        pair = {**pair, "all": (sum(launches for launches, _ in pair.values()), sum(size for _, size in pair.values()))}
    is_whole = has_weight_gradients(verdict.launches_by_phase)  # where a rehearsed rank holds MoE layers alone
    what = "forward and backward" if is_whole else "without weight gradients"
    for stream, (launches, size) in pair.items():
        table.add_row(f"{MOE_LAYER} pair", what, stream, f"{launches:,.1f}", _giga(size))
    return table


_ORDER = (MOE_LAYER, DENSE_LAYER, MTP_MODULE, WHOLE_STEP)


def _passes(verdict: RehearsalResult, number: int) -> Table:
    table = _table(f"The operations of a {MOE_LAYER} in one micro-batch that move the most bytes")
    for heading in ("operation", "phase", "stream", "place", "launches", "GB"):
        justify: JustifyMethod = "right" if heading in ("launches", "GB") else "left"
        table.add_column(heading, justify=justify, overflow="fold")
    for count in [each for each in verdict.launches_by_operation if each.of == MOE_LAYER][:number]:
        _add_count(table, count, (count.operation, count.phase, count.stream, count.place))
    return table


def _add_count(table: Table, count: MeanKernelLaunches, cells: Sequence[str]) -> None:
    table.add_row(*cells, f"{count.launches:,.1f}", _giga(count.bytes))


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left")


def _giga(size: float) -> str:
    return f"{size / 1e9:,.3f}" if size < 1e9 else f"{size / 1e9:,.2f}"
