"""A simulated step in the runtime's trace vocabulary, for Perfetto beside a real one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ...comm.trace import GRADIENT_SYNC_WAIT, OPTIMIZER, PIPELINE_WAIT, TimelineTrack
from ...parallelism.pipeline.placement import StageLocation
from ...parallelism.pipeline.program import Instruction
from ...trainer.telemetry.trace import Span, to_chrome_trace_events
from .forecast import StepForecast
from .stream_simulation import ChunkTimeModel


def write_simulated_trace(path: Path, forecast: StepForecast, costs: ChunkTimeModel) -> None:
    """Write one column of the grid, a rank of each pipeline rank: instructions, waits, and both lanes inside them."""
    events = [
        event
        for rank in range(len(forecast.time_terms_by_rank))
        for event in to_chrome_trace_events(rank, list(_spans(forecast, costs, rank)))
    ]
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _spans(forecast: StepForecast, costs: ChunkTimeModel, rank: int) -> Iterator[Span]:
    replay = forecast.program_times
    now = 0.0
    rows = replay.program.instructions[rank], replay.start_times[rank], replay.end_times[rank]
    for entry, start, end in zip(*rows, strict=True):
        if start > now:
            yield _span(TimelineTrack.INSTRUCTION, PIPELINE_WAIT, "", now, start)
        yield _span(TimelineTrack.INSTRUCTION, entry.op.value, str(entry), start, end)
        yield from _lanes(forecast, costs, rank, entry, start, end)
        now = end
    reduced = (
        replay.makespan + forecast.exposed_collective_seconds
    )  # behind its last instruction a rank waits for all others
    yield _span(TimelineTrack.INSTRUCTION, GRADIENT_SYNC_WAIT, "", now, reduced)
    yield _span(TimelineTrack.INSTRUCTION, OPTIMIZER, "", reduced, forecast.step_seconds)


def _lanes(
    forecast: StepForecast, costs: ChunkTimeModel, rank: int, entry: Instruction, start: float, end: float
) -> Iterator[Span]:
    placement = forecast.program_times.program.placement
    forward, backward = (
        None if work is None else forecast.stage_shapes[placement.stage_at(StageLocation(rank, work.chunk))]
        for work in (entry.forward, entry.backward)
    )
    lanes = costs.simulate_instruction(entry.op.value, forward, backward)
    scale = (
        (end - start) / lanes.elapsed_seconds if lanes.elapsed_seconds else 0.0
    )  # a slowed rank's lanes are stretched
    for span in lanes.spans:
        yield _span(span.track, span.name, str(entry), start + span.begin * scale, start + span.end * scale)


def _span(track: TimelineTrack, name: str, detail: str, begin: float, end: float) -> Span:
    return Span(track, name, detail, round(begin * 1e9), round(end * 1e9))
