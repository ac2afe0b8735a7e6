"""Diagnosis of a hang: the missing call or the shortest cycle of waits, and the position of every rank."""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise

from ..findings import RunFinding, has_raised
from ..log import RankLog
from .simulation import DeadlockSimulation
from .waits import HOST_STREAM, Actor


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
    stuck = sorted({actor.rank for actor in simulation.waiting})
    lines += [f"  rank {rank}: {_describe_rank(simulation, rank)}" for rank in stuck]
    return RunFinding("hang", ranks, "\n".join(lines), tuple(simulation.hosts[rank].code_location for rank in ranks))


def _shortest_chain(simulation: DeadlockSimulation) -> list[Actor]:
    """Return the shortest path to a rank that ended without a call that others wait for, else the shortest cycle."""
    starts = sorted(simulation.waiting, key=lambda actor: (actor.rank, actor.stream))
    ended = {Actor(rank) for rank, host in simulation.hosts.items() if host.has_ended}
    paths = [path for start in starts if (path := _shortest_path(simulation, start, ended))]
    cycles = [path for start in starts if (path := _shortest_path(simulation, start, {start}))]
    return min(paths or cycles, key=len)


def _shortest_path(simulation: DeadlockSimulation, start: Actor, ends: Collection[Actor]) -> list[Actor]:
    """Return the shortest chain of waits from one actor to one of `ends`, both included; empty if there is none."""
    seen: set[Actor] = set()
    paths = deque([[start]])
    while paths:
        path = paths.popleft()
        wait = simulation.waiting.get(path[-1])
        for other in wait.blocking_actors() if wait is not None else ():
            if other in ends:
                return [*path, other]
            if other not in seen:
                seen.add(other)
                paths.append([*path, other])
    return []


def _chain_lines(simulation: DeadlockSimulation, chain: Sequence[Actor]) -> Iterator[str]:
    for actor, other in pairwise(chain):
        yield f"{actor} {_describe_wait(simulation, actor)}: blocked by {other}"
    if chain[-1] not in simulation.waiting:
        yield f"{chain[-1]} has ended without that call"


def _describe_rank(simulation: DeadlockSimulation, rank: int) -> str:
    """Return the position of a rank's host, and the waits of its streams."""
    parts = [f"host {_describe_wait(simulation, Actor(rank))} at {simulation.hosts[rank].code_location}"]
    streams = sorted(actor.stream for actor in simulation.waiting if actor.rank == rank and actor.stream != HOST_STREAM)
    parts += [f"stream {stream} {_describe_wait(simulation, Actor(rank, stream))}" for stream in streams]
    return "; ".join(parts)


def _describe_wait(simulation: DeadlockSimulation, actor: Actor) -> str:
    wait = simulation.waiting.get(actor)
    return "has ended" if wait is None else wait.text
