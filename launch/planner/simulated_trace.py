"""A simulated step as a Chrome trace with the runtime's names, to compare with a real one in Perfetto."""

import json
from collections.abc import Iterator

from ...comm.trace import GRADIENT_SYNC_WAIT, OPTIMIZER, PIPELINE_WAIT, TimelineTrack
from ...parallelism.pipeline.placement import StageLocation
from ...parallelism.pipeline.program import Instruction
from ...trainer.telemetry.trace import Span, to_chrome_trace_events
from .forecast import StepForecast
from .stream_simulation import ChunkTimeModel


def simulated_trace(forecast: StepForecast, costs: ChunkTimeModel) -> str:
    """Return the trace of one rank per pipeline rank: instructions, waits, and the compute and exchange streams."""
    events = [
        event
        for rank in range(len(forecast.time_terms_by_rank))
        for event in to_chrome_trace_events(rank, list(_spans(forecast, costs, rank)))
    ]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _spans(forecast: StepForecast, costs: ChunkTimeModel, rank: int) -> Iterator[Span]:
    times, now = forecast.program_times, 0.0
    for entry, start, end in times.timed_instructions[rank]:
        if start > now:
            yield _span(TimelineTrack.INSTRUCTION, PIPELINE_WAIT, "", now, start)
        yield _span(TimelineTrack.INSTRUCTION, entry.op.value, str(entry), start, end)
        yield from _stream_spans(forecast, costs, rank, entry, start, end)
        now = end
    # After its last instruction a rank waits for all others: the gradient norm is a sum over all ranks.
    reduced = times.makespan + forecast.exposed_collective_seconds
    yield _span(TimelineTrack.INSTRUCTION, GRADIENT_SYNC_WAIT, "", now, reduced)
    yield _span(TimelineTrack.INSTRUCTION, OPTIMIZER, "", reduced, forecast.step_seconds)


def _stream_spans(
    forecast: StepForecast, costs: ChunkTimeModel, rank: int, entry: Instruction, start: float, end: float
) -> Iterator[Span]:
    placement = forecast.program_times.program.placement
    forward, backward = (
        None if work is None else forecast.stage_shapes[placement.stage_at(StageLocation(rank, work.chunk))]
        for work in (entry.forward, entry.backward)
    )
    streams = costs.simulate_instruction(entry.op.value, forward, backward)
    # The streams are simulated at nominal speed; a rank that is slowed (--jitter, what-ifs) stretches them.
    scale = (end - start) / streams.elapsed_seconds if streams.elapsed_seconds else 0.0
    for span in streams.spans:
        yield _span(span.track, span.name, str(entry), start + span.begin * scale, start + span.end * scale)


def _span(track: TimelineTrack, name: str, detail: str, begin: float, end: float) -> Span:
    return Span(track, name, detail, round(begin * 1e9), round(end * 1e9))
