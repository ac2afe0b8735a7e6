"""The result of a rehearsal as an answer: its findings, then the figures behind them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from ...comm.units import format_giga
from ..answers.blocks import (
    Answer,
    Block,
    Cell,
    Formats,
    PageSection,
    Paragraph,
    PreformattedText,
    Quantity,
    TableBlock,
    TableRow,
    number,
    records_table,
    table,
)
from .checks import MAX_GROUP_CREATIONS, MAX_WORLD_COLLECTIVES, peak_memory_relative_error
from .findings import format_ranks
from .launch_counts import MOE_LAYER, OWNERS, MeanKernelLaunches, has_weight_gradients, moe_layer_totals
from .log import CollectiveRecord, P2PBatchRecord, RankLog
from .result import RehearsalResult, step_host_waits


def rehearsal_answer(result: RehearsalResult, operations: int) -> Answer:
    """Return the findings and the figures, with the `operations` largest operations of an MoE layer.

    Sizes are in bytes, times in seconds.
    """
    data = _data(result)
    figures = [*_rank_tables(data), _memory_by_phase(result), _phases(result)]
    if operations:
        figures.append(_operations(data["top_operations"], operations))
    return Answer(
        "Rehearsal of one step",
        data,
        [PageSection("", "", [*_summary(result), *figures])],
        state=_verdict(result),
        state_style="bad" if result.findings else "good",
        exit_code=1 if result.findings else 0,
    )


def _data(result: RehearsalResult) -> dict[str, Any]:
    shared, messages = result.compared_counts
    totals = moe_layer_totals(result.launches_by_phase)
    return {
        "findings": [asdict(finding) for finding in result.findings],
        "mismatches": result.mismatch_count,
        "compared_counts": {"collectives": shared, "p2p_ops": messages},
        "deadlock_check": "not run" if result.failed_ranks else "run",
        "assumptions": list(result.assumptions),
        "limits": {"max_group_creations": MAX_GROUP_CREATIONS, "max_world_collectives": MAX_WORLD_COLLECTIVES},
        "ranks": [_rank_tree(log) for log in result.logs],
        "host_waits": [asdict(each) for each in result.host_wait_summaries],
        "phases": [_count_tree(count) for count in result.launches_by_phase],
        "moe_layer_totals": {stream: {"launches": each[0], "bytes": each[1]} for stream, each in totals.items()},
        "moe_layer_total": dict(zip(("launches", "bytes"), _sum(totals.values()), strict=True)),
        "moe_layer_totals_have_weight_gradients": has_weight_gradients(result.launches_by_phase),
        "top_operations": [asdict(count) for count in result.launches_by_operation],
    }


def _rank_tree(log: RankLog) -> dict[str, Any]:
    return {
        "rank": log.rank,
        "pp_rank": log.pp_rank,
        "micro_batches": log.micro_batches,
        "operations": log.operations,
        "collectives": sum(1 for _ in log.events_of(CollectiveRecord)),
        "p2p_batches": sum(1 for _ in log.events_of(P2PBatchRecord)),
        "host_waits": sum(1 for _ in step_host_waits(log)),
        "group_creations": log.group_creations,
        "memory": asdict(log.memory),
        "peak_relative_error": peak_memory_relative_error(log),
        "rehearsal_seconds": log.seconds,
    }


def _count_tree(count: MeanKernelLaunches) -> dict[str, Any]:
    names = ("owner", "phase", "stream", "launches", "bytes")
    return {name: getattr(count, name) for name in names}


def _sum(totals: Iterable[tuple[float, float]]) -> tuple[float, float]:
    rows = list(totals)
    return sum(launches for launches, _ in rows), sum(size for _, size in rows)


def _verdict(result: RehearsalResult) -> str:
    count = len(result.findings)
    return f"{count} finding{'s' if count > 1 else ''}" if count else "no findings"


def _summary(result: RehearsalResult) -> Iterator[Block]:
    """Yield findings, comparisons and assumptions."""
    first, (collectives, messages) = result.logs[0], result.compared_counts
    ranks = f"{len(result.logs)} of {first.world_size} ranks, {first.micro_batches} micro-batches"
    yield Paragraph(f"{_verdict(result)}: {ranks}")
    # As it is, without wrapping: a hang's text has one line per rank.
    yield from (PreformattedText("", str(finding)) for finding in result.findings)
    compared = f"{collectives:,} collectives and {messages:,} messages between rehearsed ranks"
    yield Paragraph(f"{result.mismatch_count} mismatches in {compared}")
    if result.failed_ranks:
        yield Paragraph(f"deadlock check: not run, because the step of {format_ranks(result.failed_ranks)} failed")
    yield from (Paragraph(f"assumed: {text}") for text in result.assumptions)


def _rank_tables(data: Mapping[str, Any]) -> Iterator[TableBlock]:
    """Yield the tables that have the data's records as rows: counts and memory of each rank, and waits by code line."""
    headings = {"rank": "rank", "pp_rank": "pp", "operations": "operations", "collectives": "collectives"}
    headings |= {"p2p_batches": "P2P batches", "host_waits": "host waits", "group_creations": "groups"}
    headings |= {"rehearsal_seconds": "s"}
    yield records_table("Rehearsed ranks", headings, data["ranks"], {"rehearsal_seconds": "{:.1f}".format})
    headings = {"rank": "rank", "peak_bytes": "peak", "peak_phase": "phase", "predicted_peak_bytes": "predicted"}
    headings |= {"peak_relative_error": "difference", "capacity_bytes": "GPU capacity"}
    formats = {name: _format_gigabytes for name in headings if name.endswith("_bytes")}
    peaks = [{**tree, **tree["memory"]} for tree in data["ranks"]]
    title = "Peak of live tensors, GB, and the prediction of `memory`"
    yield records_table(title, headings, peaks, {**formats, "peak_relative_error": "{:+.1%}".format})
    headings = {"code_line": "code location", "reason": "reason", "is_inside_fb": "in FB"}
    headings |= {"max_per_rank": "max per rank", "count": "all ranks"}
    yield records_table("Waits of the host for the device", headings, data["host_waits"])


def _memory_by_phase(result: RehearsalResult) -> TableBlock:
    built = max(result.logs, key=lambda log: log.memory.peak_while_building_bytes)
    while_building = _gigabytes(built.memory.peak_while_building_bytes), number(built.rank)
    phases = [(phase, _gigabytes(size), number(rank)) for phase, (size, rank) in result.peak_bytes_by_phase.items()]
    rows = [("building model and optimizer", *while_building), *phases]
    return table("Live tensors by phase, GB", ("phase", "peak", "rank"), _with_rules([rows[:1], rows[1:]]))


def _phases(result: RehearsalResult) -> TableBlock:
    counts = sorted(result.launches_by_phase, key=lambda count: (OWNERS.index(count.owner), count.stream, -count.bytes))
    groups = [
        [(*key[:1], count.phase, *key[1:], *_launches(count.launches, count.bytes)) for count in same]
        for key, same in groupby(counts, key=lambda count: (count.owner, count.stream))
    ]
    totals = moe_layer_totals(result.launches_by_phase)
    if len(totals) > 1:
        totals = {**totals, "all": _sum(totals.values())}
    is_complete = has_weight_gradients(result.launches_by_phase)  # needs a rehearsed rank that holds only MoE layers
    phases = "forward + backward" if is_complete else "without weight gradients"
    groups.append([(f"{MOE_LAYER}, total", phases, stream, *_launches(*total)) for stream, total in totals.items()])
    title = "Kernel launches and GB moved, per layer and micro-batch or per step"
    return table(title, ("module", "phase", "stream", "launches", "GB"), _with_rules(groups))


def _operations(counts: Sequence[Mapping[str, Any]], most: int) -> TableBlock:
    names = ("operation", "phase", "stream", "code_location", "launches")
    headings = {name: name.replace("_", " ") for name in names} | {"bytes": "GB"}
    formats: Formats = {"launches": "{:,.1f}".format, "bytes": _format_gigabytes}
    title = f"Operations of a {MOE_LAYER} in one micro-batch that move the most bytes"
    return records_table(title, headings, [each for each in counts if each["owner"] == MOE_LAYER][:most], formats)


def _with_rules(groups: Sequence[Sequence[Sequence[Cell]]]) -> list[TableRow]:
    return [TableRow(cells, begins_group=cells is group[0]) for group in groups for cells in group]


def _launches(launches: float, size: float) -> tuple[Quantity, Quantity]:
    return number(launches, ",.1f"), _gigabytes(size)


def _gigabytes(size: float) -> Quantity:
    return Quantity(size, _format_gigabytes(size))


def _format_gigabytes(size: float) -> str:
    return format_giga(size, 3 if size < 1e9 else 2)
