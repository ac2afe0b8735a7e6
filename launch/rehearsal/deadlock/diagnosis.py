"""Why a simulation has come to a stop: the call that is missing, or the shortest cycle, and where every rank stands."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import assert_never

from ..findings import RunFinding, has_raised
from ..log import CollectiveRecord, HostWait, LogEvent, P2PBatchRecord, RankLog
from .simulation import DeadlockSimulation
from .waits import (
    HOST_STREAM,
    Actor,
    CollectiveCompletionWait,
    CollectiveConnectWait,
    LaunchOrderWait,
    P2PCompletionWait,
    P2PConnectWait,
    StreamProgressWait,
    Wait,
)


def find_hangs(logs: Sequence[RankLog]) -> Iterator[RunFinding]:
    """Return errors of first contacts, and the hang in which the logs end, if they do.

    Where a rank's log ends by an error, others wait for what it would have done: then nothing is said.
    """
    if any(has_raised(log) for log in logs):
        return
    simulation = DeadlockSimulation(logs)
    simulation.run()
    yield from simulation.findings
    if simulation.waiting:
        yield _hang(simulation)


def _hang(simulation: DeadlockSimulation) -> RunFinding:
    chain = _shortest_chain(simulation)
    ranks = tuple(dict.fromkeys(actor.rank for actor in chain))
    lines = ["nothing can move.", *(f"    {line}" for line in _chain_lines(simulation, chain))]
    lines += [f"  rank {rank}: {_standing(simulation, rank)}" for rank in _stuck_ranks(simulation)]
    return RunFinding("hang", ranks, "\n".join(lines), tuple(_place(simulation, rank) for rank in ranks))


def _shortest_chain(simulation: DeadlockSimulation) -> list[Actor]:
    """Return a way to a rank that has ended without a call that others wait for, else the shortest cycle."""
    starts = sorted(simulation.waiting, key=lambda actor: (actor.rank, actor.stream))
    ways = [way for start in starts if (way := _way_to_end(simulation, start))]
    cycles = [way for start in starts if (way := _way(simulation, start, start))]
    return min(ways or cycles, key=len)


def _way_to_end(simulation: DeadlockSimulation, start: Actor) -> list[Actor]:
    ends = [Actor(rank) for rank in simulation.hosts if simulation.has_host_finished(rank)]
    ways = [way for end in ends if (way := _way(simulation, start, end))]
    return min(ways, key=len, default=[])


def _way(simulation: DeadlockSimulation, start: Actor, end: Actor) -> list[Actor]:
    """Return the shortest chain of waits from one actor to another, both included; empty where there is none."""
    before: dict[Actor, Actor] = {}
    queue = deque([start])
    while queue:
        actor = queue.popleft()
        for other in blocking_actors(simulation, actor):
            if other in before:
                continue
            before[other] = actor
            if other == end:
                return _backwards(before, start, end)
            queue.append(other)
    return []


def _backwards(before: dict[Actor, Actor], start: Actor, end: Actor) -> list[Actor]:
    way = [end, before[end]]
    while way[-1] != start:
        way.append(before[way[-1]])
    return way[::-1]


def blocking_actors(simulation: DeadlockSimulation, actor: Actor) -> list[Actor]:
    """Return what the actor waits for; nothing where it does not wait."""
    wait = simulation.waiting.get(actor)
    if wait is None:
        return []
    if isinstance(wait, CollectiveConnectWait):
        missing = simulation.rehearsed_members(wait.communicator) - simulation.ranks_connecting[wait]
        return [Actor(rank) for rank in sorted(missing)]
    if isinstance(wait, P2PConnectWait):
        missing = frozenset((wait.source, wait.target)) - simulation.ranks_connecting[wait]
        return [Actor(rank) for rank in sorted(missing)]
    if isinstance(wait, StreamProgressWait):
        return [wait.actor]
    if isinstance(wait, CollectiveCompletionWait):
        missing = (
            simulation.rehearsed_members(wait.communicator)
            - simulation.ranks_in_collective[wait.communicator, wait.collective_index]
        )
        return [simulation.stream_of_operation.get((wait.wake_key, rank), Actor(rank)) for rank in sorted(missing)]
    if isinstance(wait, P2PCompletionWait):
        peer = wait.target if actor.rank == wait.source else wait.source
        return [simulation.stream_of_operation.get((wait.wake_key, peer), Actor(peer))]
    if isinstance(wait, LaunchOrderWait):
        return [simulation.stream_of_operation[wait.wake_key, wait.launch_index - 1]]
    assert_never(wait)


def _chain_lines(simulation: DeadlockSimulation, chain: Sequence[Actor]) -> Iterator[str]:
    for actor, other in pairwise(chain):
        yield f"{actor} {_waits(simulation, actor)}: for {other}"
    if simulation.waiting.get(chain[-1]) is None:
        yield f"{chain[-1]} has ended without it"


def _stuck_ranks(simulation: DeadlockSimulation) -> list[int]:
    return sorted({actor.rank for actor in simulation.waiting})


def _standing(simulation: DeadlockSimulation, rank: int) -> str:
    """Return where the host of a rank is, and what its streams wait for."""
    parts = [f"host {_waits(simulation, Actor(rank))} at {_place(simulation, rank)}"]
    streams = sorted(actor.stream for actor in simulation.waiting if actor.rank == rank and actor.stream != HOST_STREAM)
    parts += [f"stream {stream} {_waits(simulation, Actor(rank, stream))}" for stream in streams]
    return "; ".join(parts)


def _place(simulation: DeadlockSimulation, rank: int) -> str:
    host = simulation.hosts[rank]
    if simulation.has_host_finished(rank):
        return "the end of its log"
    return call_location(host.log.events[host.position])


def call_location(event: LogEvent) -> str:
    """Return where the code makes the call; a host only stops at calls that have a place."""
    assert isinstance(event, CollectiveRecord | P2PBatchRecord | HostWait)
    return event.code_location


def _waits(simulation: DeadlockSimulation, actor: Actor) -> str:
    wait = simulation.waiting.get(actor)
    return "has ended" if wait is None else _text(wait, actor.rank)


def _text(wait: Wait, rank: int) -> str:
    if isinstance(wait, CollectiveConnectWait):
        return f"connects {wait.communicator} for its first {wait.operation}"
    if isinstance(wait, P2PConnectWait):
        return f"connects rank {wait.source} to rank {wait.target} on {wait.communicator} for its first message"
    if isinstance(wait, StreamProgressWait):
        return f"waits ({wait.reason}) for stream {wait.actor.stream}"
    if isinstance(wait, CollectiveCompletionWait):
        return f"is in number {wait.collective_index + 1} on {wait.communicator} ({wait.purpose})"
    if isinstance(wait, P2PCompletionWait):
        peer = wait.target if rank == wait.source else wait.source
        does = f"sends to rank {peer}" if rank == wait.source else f"receives from rank {peer}"
        return f"{does} on {wait.communicator} ({wait.purpose})"
    if isinstance(wait, LaunchOrderWait):
        return f"waits for an earlier operation on {wait.communicator}"
    assert_never(wait)
