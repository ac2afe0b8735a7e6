"""What a step may do on one rank at most, and how much memory it may need."""

from __future__ import annotations

from collections.abc import Iterator

from ...trainer.memory.forecast import MARGIN
from .deadlock.waits import CONTROL
from .fault import ends_early
from .log import Collective, Finding, HostWait, RankLog

WORLD = "world"
WORLD_REDUCTIONS = 2
"""In a step, over all ranks: each is a wait for the slowest of them."""
GROUP_CREATIONS = 20
"""Each is a call in which all ranks take part; at 2048 ranks one takes tens of milliseconds or more."""


def step_findings(log: RankLog) -> Iterator[Finding]:
    """Return what the rank's step does beyond its limits."""
    yield from _host_reads(log)
    yield from _control(log)
    yield from _world(log)
    if log.group_creations > GROUP_CREATIONS:
        text = f"{log.group_creations} process groups are created, and {GROUP_CREATIONS} are enough for any grid"
        yield Finding("groups", text, "comm/open_groups.py")
    yield from _memory(log)


def in_step(log: RankLog) -> Iterator[Collective]:
    """Return the collectives of the step, without those that only connect."""
    return (event for event in log.events if isinstance(event, Collective) and not event.is_warm_up)


def _host_reads(log: RankLog) -> Iterator[Finding]:
    """Inside an FB the host may wait for the event of a dispatch's sizes: all else stops what hides an exchange."""
    known = {finding.place for finding in log.findings if finding.kind == "host read"}
    for event in log.events:
        if not isinstance(event, HostWait) or not event.is_inside_pair or event.reason == "event":
            continue
        if event.place not in known:
            text = f"the host waits for stream {event.stream} ({event.reason}) inside an FB"
            yield Finding("host read", text, event.place)


def _control(log: RankLog) -> Iterator[Finding]:
    for event in in_step(log):
        if event.group == CONTROL:
            text = f"{event.operation} ({event.what}) over gloo inside the step, where the host waits for all ranks"
            yield Finding("control", text, event.place)


def _world(log: RankLog) -> Iterator[Finding]:
    found = [event for event in in_step(log) if event.group == WORLD]
    if len(found) > WORLD_REDUCTIONS:
        named = ", ".join(f"{event.operation} ({event.what})" for event in found)
        text = f"{len(found)} collectives over all ranks in one step, {WORLD_REDUCTIONS} are allowed: {named}"
        yield Finding("world", text, found[WORLD_REDUCTIONS].place)


def _memory(log: RankLog) -> Iterator[Finding]:
    memory = log.memory
    if ends_early(log):
        return
    if abs(difference(log)) > MARGIN:
        text = (
            f"{memory.peak / 1e9:.2f} GB of tensors are alive at the peak and {memory.predicted / 1e9:.2f} are"
            f" predicted ({difference(log):+.1%}; {MARGIN:.0%} is allowed)"
        )
        yield Finding("memory", text, memory.peak_phase)
    most = max(memory.peak, memory.building)
    is_known = any(finding.kind == "memory" for finding in log.findings)
    if memory.capacity is not None and most > memory.capacity and not is_known:
        text = f"{most / 1e9:.2f} GB of tensors are alive and the GPU has room for {memory.capacity / 1e9:.2f}"
        yield Finding("memory", text, memory.peak_phase)


def difference(log: RankLog) -> float:
    """Return how far the peak of live tensors is above what `shoestring memory` predicts, relative to that."""
    return log.memory.peak / log.memory.predicted - 1
