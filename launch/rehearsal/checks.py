"""Limits of one rank's step: collectives of the host and over all ranks, group creations and memory."""

from collections.abc import Iterator

from ...comm.units import format_giga
from ...trainer.memory.forecast import PREDICTION_MARGIN
from .deadlock.waits import CONTROL_GROUP
from .findings import has_raised
from .log import CollectiveRecord, RankFinding, RankLog

WORLD_GROUP = "world"
MAX_WORLD_COLLECTIVES = 2
"""Limit on collectives over all ranks in a step: each waits for the slowest rank."""
MAX_GROUP_CREATIONS = 20
"""Limit on group creations: all ranks take part in each; at 2048 ranks one takes tens of milliseconds or more."""


def check_step(log: RankLog) -> Iterator[RankFinding]:
    """Yield a finding for each limit that the rank's step exceeds."""
    collectives = [event for event in log.events_of(CollectiveRecord) if not event.is_warm_up]
    for event in collectives:
        if event.group == CONTROL_GROUP:
            does = f"{event.operation} ({event.purpose})"
            text = f"{does} over gloo inside the step, at which the host waits for all ranks"
            yield RankFinding("control", text, event.code_location)
    over_world = [event for event in collectives if event.group == WORLD_GROUP]
    if len(over_world) > MAX_WORLD_COLLECTIVES:
        named = ", ".join(f"{event.operation} ({event.purpose})" for event in over_world)
        text = f"{len(over_world)} collectives over all ranks in one step, limit {MAX_WORLD_COLLECTIVES}: {named}"
        yield RankFinding("world", text, over_world[MAX_WORLD_COLLECTIVES].code_location)
    if log.group_creations > MAX_GROUP_CREATIONS:
        text = f"{log.group_creations} process groups are created; any grid needs at most {MAX_GROUP_CREATIONS}"
        yield RankFinding("groups", text, "comm/group_factory.py")
    yield from _memory(log)


def _memory(log: RankLog) -> Iterator[RankFinding]:
    memory = log.memory
    in_step = memory.peak_bytes >= memory.peak_while_building_bytes
    peak = max(memory.peak_bytes, memory.peak_while_building_bytes)
    if memory.capacity_bytes is not None and peak > memory.capacity_bytes:
        phase = memory.peak_phase if in_step else "building"
        needs, has = format_giga(peak, 1), format_giga(memory.capacity_bytes, 1)
        text = f"live tensors need {needs} GB in {phase}, the GPU has {has} GB for tensors"
        yield RankFinding("memory", text, phase)
    if not has_raised(log) and abs(peak_memory_relative_error(log)) > PREDICTION_MARGIN:
        text = (
            f"live tensors peak at {format_giga(memory.peak_bytes)} GB,"
            f" predicted {format_giga(memory.predicted_peak_bytes)} GB"
            f" ({peak_memory_relative_error(log):+.1%}, limit {PREDICTION_MARGIN:.0%})"
        )
        yield RankFinding("memory", text, memory.peak_phase)


def peak_memory_relative_error(log: RankLog) -> float:
    """Return the peak of live tensors divided by the prediction of `shoestring memory`, minus 1."""
    return log.memory.peak_bytes / log.memory.predicted_peak_bytes - 1
