"""Diagnosis of a hang: the missing call or the shortest cycle of waits, and the position of every rank."""

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
    """Yield errors of connection order, and the hang in which the logs end, if they do."""
    # After an exception of one rank the others wait for its missing calls, which is not a hang of the run.
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
    lines = ["no rank can continue.", *(f"    {line}" for line in _chain_lines(simulation, chain))]
    lines += [f"  rank {rank}: {_describe_rank(simulation, rank)}" for rank in _stuck_ranks(simulation)]
    return RunFinding("hang", ranks, "\n".join(lines), tuple(_host_location(simulation, rank) for rank in ranks))


def _shortest_chain(simulation: DeadlockSimulation) -> list[Actor]:
    """Return the shortest path to a rank that ended without a call that others wait for, else the shortest cycle."""
    starts = sorted(simulation.waiting, key=lambda actor: (actor.rank, actor.stream))
    paths = [path for start in starts if (path := _path_to_end(simulation, start))]
    cycles = [path for start in starts if (path := _shortest_path(simulation, start, start))]
    return min(paths or cycles, key=len)


def _path_to_end(simulation: DeadlockSimulation, start: Actor) -> list[Actor]:
    ends = [Actor(rank) for rank in simulation.hosts if simulation.has_host_finished(rank)]
    paths = [path for end in ends if (path := _shortest_path(simulation, start, end))]
    return min(paths, key=len, default=[])


def _shortest_path(simulation: DeadlockSimulation, start: Actor, end: Actor) -> list[Actor]:
    """Return the shortest chain of waits from one actor to another, both included; empty if there is none."""
    before: dict[Actor, Actor] = {}
    queue = deque([start])
    while queue:
        actor = queue.popleft()
        for other in blocking_actors(simulation, actor):
            if other in before:
                continue
            before[other] = actor
            if other == end:
                return _reconstruct_path(before, start, end)
            queue.append(other)
    return []


def _reconstruct_path(before: dict[Actor, Actor], start: Actor, end: Actor) -> list[Actor]:
    path = [end, before[end]]
    while path[-1] != start:
        path.append(before[path[-1]])
    return path[::-1]


def blocking_actors(simulation: DeadlockSimulation, actor: Actor) -> list[Actor]:
    """Return the actors that the actor waits for; empty if it does not wait."""
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
        yield f"{actor} {_describe_wait(simulation, actor)}: blocked by {other}"
    if simulation.waiting.get(chain[-1]) is None:
        yield f"{chain[-1]} has ended without that call"


def _stuck_ranks(simulation: DeadlockSimulation) -> list[int]:
    return sorted({actor.rank for actor in simulation.waiting})


def _describe_rank(simulation: DeadlockSimulation, rank: int) -> str:
    """Return the position of a rank's host, and the waits of its streams."""
    parts = [f"host {_describe_wait(simulation, Actor(rank))} at {_host_location(simulation, rank)}"]
    streams = sorted(actor.stream for actor in simulation.waiting if actor.rank == rank and actor.stream != HOST_STREAM)
    parts += [f"stream {stream} {_describe_wait(simulation, Actor(rank, stream))}" for stream in streams]
    return "; ".join(parts)


def _host_location(simulation: DeadlockSimulation, rank: int) -> str:
    host = simulation.hosts[rank]
    if simulation.has_host_finished(rank):
        return "the end of its log"
    return call_location(host.log.events[host.position])


def call_location(event: LogEvent) -> str:
    """Return the code location of a call; a host only stops at calls that have one."""
    assert isinstance(event, CollectiveRecord | P2PBatchRecord | HostWait)
    return event.code_location


def _describe_wait(simulation: DeadlockSimulation, actor: Actor) -> str:
    wait = simulation.waiting.get(actor)
    return "has ended" if wait is None else _wait_text(wait, actor.rank)


def _wait_text(wait: Wait, rank: int) -> str:
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
