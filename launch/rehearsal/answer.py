"""The result of a rehearsal as an answer: its findings, then the figures behind them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from ..answers.blocks import (
    Answer,
    Block,
    Cell,
    PageSection,
    Paragraph,
    PreformattedText,
    Quantity,
    TableBlock,
    TableRow,
    number,
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
    figures = [_ranks(result), _peak_memory(result), _host_waits(result), _memory_by_phase(result), _phases(result)]
    if operations:
        figures.append(_operations(result, operations))
    return Answer(
        "Rehearsal of one step",
        _data(result),
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


def _ranks(result: RehearsalResult) -> TableBlock:
    trees = [_rank_tree(log) for log in result.logs]
    counts = ("rank", "pp_rank", "operations", "collectives", "p2p_batches", "host_waits", "group_creations")
    rows = [(*(number(tree[name]) for name in counts), number(tree["rehearsal_seconds"], ".1f")) for tree in trees]
    headings = ("rank", "pp", "operations", "collectives", "P2P batches", "host waits", "groups", "s")
    return table("Rehearsed ranks", headings, rows)


def _peak_memory(result: RehearsalResult) -> TableBlock:
    rows: list[Sequence[Cell]] = []
    for log in result.logs:
        memory = log.memory
        peak, predicted = _gigabytes(memory.peak_bytes), _gigabytes(memory.predicted_peak_bytes)
        error = number(peak_memory_relative_error(log), "+.1%")
        capacity = "-" if memory.capacity_bytes is None else _gigabytes(memory.capacity_bytes)
        rows.append((number(log.rank), peak, memory.peak_phase, predicted, error, capacity))
    headings = ("rank", "peak", "phase", "predicted", "difference", "GPU capacity")
    return table("Peak of live tensors, GB, and the prediction of `memory`", headings, rows)


def _host_waits(result: RehearsalResult) -> TableBlock:
    rows = [
        (
            each.code_line,
            each.reason,
            "yes" if each.is_inside_fb else "no",
            number(each.max_per_rank),
            number(each.count),
        )
        for each in result.host_wait_summaries
    ]
    headings = ("code location", "reason", "in FB", "max per rank", "all ranks")
    return table("Waits of the host for the device", headings, rows)


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


def _operations(result: RehearsalResult, most: int) -> TableBlock:
    counts = [each for each in result.launches_by_operation if each.owner == MOE_LAYER][:most]
    rows = [
        (each.operation, each.phase, each.stream, each.code_location, *_launches(each.launches, each.bytes))
        for each in counts
    ]
    title = f"Operations of a {MOE_LAYER} in one micro-batch that move the most bytes"
    return table(title, ("operation", "phase", "stream", "code location", "launches", "GB"), rows)


def _with_rules(groups: Sequence[Sequence[Sequence[Cell]]]) -> list[TableRow]:
    return [TableRow(cells, begins_group=cells is group[0]) for group in groups for cells in group]


def _launches(launches: float, size: float) -> tuple[Quantity, Quantity]:
    return number(launches, ",.1f"), _gigabytes(size)


def _gigabytes(size: float) -> Quantity:
    return number(size, ",.3f" if size < 1e9 else ",.2f", scale=1e-9)
