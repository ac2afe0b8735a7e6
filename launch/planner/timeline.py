"""A simulated step in the runtime's trace vocabulary, for Perfetto beside a real one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ...comm.trace import EDGE_WAIT, OPTIMIZER, REDUCE_WAIT, Track
from ...parallelism.pipeline.placement import StagePlace
from ...parallelism.pipeline.program import Instruction
from ...trainer.telemetry.trace import Span, trace_events
from .forecast import Forecast
from .lanes import ChunkCosts


def write_timeline(path: Path, forecast: Forecast, costs: ChunkCosts) -> None:
    """Write one column of the grid, a rank of each pipeline rank: instructions, waits, and both lanes inside them."""
    events = [
        event
        for rank in range(len(forecast.terms))
        for event in trace_events(rank, list(_spans(forecast, costs, rank)))
    ]
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _spans(forecast: Forecast, costs: ChunkCosts, rank: int) -> Iterator[Span]:
    replay = forecast.replay
    now = 0.0
    rows = replay.program.instructions[rank], replay.starts[rank], replay.ends[rank]
    for entry, start, end in zip(*rows, strict=True):
        if start > now:
            yield _span(Track.INSTRUCTION, EDGE_WAIT, "", now, start)
        yield _span(Track.INSTRUCTION, entry.op.value, str(entry), start, end)
        yield from _lanes(forecast, costs, rank, entry, start, end)
        now = end
    reduced = replay.makespan + forecast.reduce  # behind its last instruction a rank waits for all others
    yield _span(Track.INSTRUCTION, REDUCE_WAIT, "", now, reduced)
    yield _span(Track.INSTRUCTION, OPTIMIZER, "", reduced, forecast.seconds)


def _lanes(
    forecast: Forecast, costs: ChunkCosts, rank: int, entry: Instruction, start: float, end: float
) -> Iterator[Span]:
    placement = forecast.replay.program.placement
    forward, backward = (
        None if work is None else forecast.stages[placement.stage(StagePlace(rank, work.chunk))]
        for work in (entry.forward, entry.backward)
    )
    lanes = costs.run(entry.op.value, forward, backward)
    scale = (end - start) / lanes.now if lanes.now else 0.0  # a slowed rank's lanes are stretched
    for span in lanes.spans:
        yield _span(span.track, span.name, str(entry), start + span.begin * scale, start + span.end * scale)


def _span(track: Track, name: str, detail: str, begin: float, end: float) -> Span:
    return Span(track, name, detail, round(begin * 1e9), round(end * 1e9))
