"""What a step may do on one rank at most, and how much memory it may need."""

from __future__ import annotations

from collections.abc import Iterator

from ...trainer.memory.forecast import PREDICTION_MARGIN
from .deadlock.waits import CONTROL_GROUP
from .findings import has_raised
from .log import CollectiveRecord, HostWait, RankFinding, RankLog

WORLD_GROUP = "world"
MAX_WORLD_COLLECTIVES = 2
"""In a step, over all ranks: each is a wait for the slowest of them."""
MAX_GROUP_CREATIONS = 20
"""Each is a call in which all ranks take part; at 2048 ranks one takes tens of milliseconds or more."""


def check_step(log: RankLog) -> Iterator[RankFinding]:
    """Return what the rank's step does beyond its limits."""
    yield from _host_reads(log)
    yield from _control(log)
    yield from _world(log)
    if log.group_creations > MAX_GROUP_CREATIONS:
        text = f"{log.group_creations} process groups are created, and {MAX_GROUP_CREATIONS} are enough for any grid"
        yield RankFinding("groups", text, "comm/group_factory.py")
    yield from _memory(log)


def step_collectives(log: RankLog) -> Iterator[CollectiveRecord]:
    """Return the collectives of the step, without those that only connect."""
    return (event for event in log.events if isinstance(event, CollectiveRecord) and not event.is_warm_up)


def _host_reads(log: RankLog) -> Iterator[RankFinding]:
    """Inside an FB the host may wait for the event of a dispatch's sizes: all else stops what hides an exchange."""
    known = {finding.code_location for finding in log.findings if finding.kind == "host read"}
    for event in log.events:
        if not isinstance(event, HostWait) or not event.is_inside_fb or event.reason == "event":
            continue
        if event.code_location not in known:
            text = f"the host waits for stream {event.stream} ({event.reason}) inside an FB"
            yield RankFinding("host read", text, event.code_location)


def _control(log: RankLog) -> Iterator[RankFinding]:
    for event in step_collectives(log):
        if event.group == CONTROL_GROUP:
            text = f"{event.operation} ({event.purpose}) over gloo inside the step, where the host waits for all ranks"
            yield RankFinding("control", text, event.code_location)


def _world(log: RankLog) -> Iterator[RankFinding]:
    found = [event for event in step_collectives(log) if event.group == WORLD_GROUP]
    if len(found) > MAX_WORLD_COLLECTIVES:
        named = ", ".join(f"{event.operation} ({event.purpose})" for event in found)
        text = f"{len(found)} collectives over all ranks in one step, {MAX_WORLD_COLLECTIVES} are allowed: {named}"
        yield RankFinding("world", text, found[MAX_WORLD_COLLECTIVES].code_location)


def _memory(log: RankLog) -> Iterator[RankFinding]:
    memory = log.memory
    if has_raised(log):
        return
    if abs(peak_memory_relative_error(log)) > PREDICTION_MARGIN:
        text = (
            f"{memory.peak / 1e9:.2f} GB of tensors are alive at the peak and {memory.predicted / 1e9:.2f} are"
            f" predicted ({peak_memory_relative_error(log):+.1%}; {PREDICTION_MARGIN:.0%} is allowed)"
        )
        yield RankFinding("memory", text, memory.peak_phase)
    most = max(memory.peak, memory.building)
    is_known = any(finding.kind == "memory" for finding in log.findings)
    if memory.capacity is not None and most > memory.capacity and not is_known:
        text = f"{most / 1e9:.2f} GB of tensors are alive and the GPU has room for {memory.capacity / 1e9:.2f}"
        yield RankFinding("memory", text, memory.peak_phase)


def peak_memory_relative_error(log: RankLog) -> float:
    """Return how far the peak of live tensors is above what `shoestring memory` predicts, relative to that."""
    return log.memory.peak / log.memory.predicted - 1
