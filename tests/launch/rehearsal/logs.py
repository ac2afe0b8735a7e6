"""Logs of rehearsed ranks, made by hand or from a pipeline's program."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from shoestring.launch.rehearsal.log import (
    CollectiveRecord,
    DeviceMemoryRecord,
    EventRecord,
    HostWait,
    LogEvent,
    P2PBatchRecord,
    P2POpRecord,
    RankFinding,
    RankLog,
    StreamWait,
)
from shoestring.parallelism.pipeline.communication import P2PBatch, P2POp, derive_p2p_batches
from shoestring.parallelism.pipeline.placement import Direction
from shoestring.parallelism.pipeline.program import PipelineProgram

GIB = 2**30
MEMORY = DeviceMemoryRecord(20 * GIB, 25 * GIB, 70 * GIB, "mlp(B)", {"mlp(B)": 70 * GIB}, 71.0 * GIB, 76.0 * GIB)


def log(rank: int, *events: LogEvent, findings: Sequence[RankFinding] = (), world_size: int = 4) -> RankLog:
    return RankLog(
        rank=rank,
        pp_rank=rank,
        world_size=world_size,
        micro_batches=4,
        group_creations=14,
        operations=1000,
        events=events,
        launches=(),
        findings=tuple(findings),
        memory=MEMORY,
        assumptions=("routing is balanced",),
        seconds=1.5,
    )


def collective(
    what: str,
    *,
    ranks: tuple[int, ...] = (0, 1),
    group: str = "ep",
    operation: str = "all_to_all",
    sends: tuple[int, ...] = (),
    receives: tuple[int, ...] = (),
    stream: str = "exchange",
    is_warm_up: bool = False,
) -> CollectiveRecord:
    if operation == "all_to_all" and not sends:
        sends = receives = (8,) * len(ranks)
    return CollectiveRecord(
        group, ranks, operation, what, (128,), "bfloat16", sends, receives, stream, f"{what} in line 7", is_warm_up
    )


def message(what: str, peer: int) -> P2POpRecord:
    return P2POpRecord(what, peer, (1, 128, 64), "bfloat16")


def batch(
    sends: Sequence[P2POpRecord] = (),
    receives: Sequence[P2POpRecord] = (),
    *,
    group: str = "pp next",
    ranks: tuple[int, ...] = (0, 1),
    stream: str = "p2p next",
    is_warm_up: bool = False,
) -> P2PBatchRecord:
    named = "; ".join(each.purpose for each in (*sends, *receives))
    return P2PBatchRecord(group, ranks, tuple(sends), tuple(receives), stream, f"{named} in line 9", is_warm_up)


GROUPS = {Direction.NEXT: "pp next", Direction.PREV: "pp prev"}


class ProgramLog:
    """The log of one rank that runs a program over NCCL P2P channels, like `PipelineExecutor` and `NcclP2PChannel`.

    The host waits in each instruction for the computing stream, as it does for the sizes of a dispatch.
    `listener` returns the collectives called after an instruction: after its sends if `sends_first`, else before.
    """

    def __init__(
        self,
        program: PipelineProgram,
        rank: int,
        commits: Sequence[P2PBatch],
        warm: Sequence[Direction],
        listener: Callable[[int, int], Sequence[CollectiveRecord]],
        sends_first: bool,
    ) -> None:
        self._program, self._rank = program, rank
        self._events: list[LogEvent] = []
        self._made = 0
        self._arriving: dict[P2POp, int] = {}
        self._warm_up(warm)
        row = program.instructions[rank]
        for index in range(len(commits)):
            told = listener(rank, index - 1) if index else ()
            if not sends_first:
                self._events += told
            self._post(commits[index].sends, commits[index].receives)
            if sends_first:
                self._events += told
            if index < len(row):
                self._instruction(f"instruction {index} ({row[index]})", commits[index].required_receives)

    def log(self) -> RankLog:
        return log(self._rank, *self._events, world_size=self._program.ranks)

    def _warm_up(self, directions: Sequence[Direction]) -> None:
        ranks = self._program.ranks
        for direction in directions:
            near = sorted({(self._rank + step) % ranks for step in (1, -1)})
            messages = [message("warm-up", peer) for peer in near]
            self._batch(direction, messages, messages, is_warm_up=True)

    def _post(self, sends: Sequence[P2POp], receives: Sequence[P2POp]) -> None:
        for direction in Direction:
            out = [message(str(each), each.target.rank) for each in sends if each.direction is direction]
            arriving = [each for each in receives if each.direction is direction]
            if out or arriving:
                end = self._batch(direction, out, [message(str(each), each.source.rank) for each in arriving])
                self._arriving |= dict.fromkeys(arriving, end)

    def _batch(
        self,
        direction: Direction,
        out: Sequence[P2POpRecord],
        arriving: Sequence[P2POpRecord],
        is_warm_up: bool = False,
    ) -> int:
        stream, everyone = f"edge {direction}", tuple(range(self._program.ranks))
        self._events += [EventRecord(self._made, "compute"), StreamWait(self._made, stream)]
        each = batch(out, arriving, group=GROUPS[direction], ranks=everyone, stream=stream, is_warm_up=is_warm_up)
        self._events += [each, EventRecord(self._made + 1, stream)]
        self._made += 2
        return self._made - 1

    def _instruction(self, place: str, needs: Sequence[P2POp]) -> None:
        self._events += [StreamWait(self._arriving.pop(edge), "compute") for edge in needs]
        self._events += [HostWait(None, "compute", "event", place)]


def program_logs(
    program: PipelineProgram,
    *,
    warm: Sequence[Direction],
    listener: Callable[[int, int], Sequence[CollectiveRecord]] = lambda rank, index: (),
    sends_first: bool = True,
) -> list[RankLog]:
    """Return the log of every rank of the pipeline."""
    return [
        ProgramLog(program, rank, commits, warm, listener, sends_first).log()
        for rank, commits in enumerate(derive_p2p_batches(program))
    ]


def without(each: RankLog, *numbers: int) -> RankLog:
    """Return the log without the events of these numbers."""
    kept = tuple(event for number, event in enumerate(each.events) if number not in numbers)
    return replace(each, events=kept)


def swapped(each: RankLog, first: int, second: int) -> RankLog:
    """Return the log with two events swapped."""
    events = list(each.events)
    events[first], events[second] = events[second], events[first]
    return replace(each, events=tuple(events))
