"""What a rehearsal has found over all of its ranks, and every figure that it prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from ...trainer.build import stages_of
from ...trainer.config import RunConfig
from .checks import step_findings
from .compare import compare
from .counted import Count, by_operation, by_phase, layer_pair
from .deadlock.communicators import collectives_of, messages_of
from .deadlock.stuck import hangs
from .fault import Fault, ends_early, grouped, line_of
from .log import Collective, HostWait, MessageBatch, RankLog

_FIRST = ("error", "device", "hang", "first contact", "collective", "message")
"""Kinds of faults that end a run, in the order in which they are told; what is only slow or large comes behind."""


@dataclass(frozen=True)
class HostReads:
    """Waits of the host at one line of our code, over all rehearsed ranks."""

    line: str
    reason: str
    is_inside_pair: bool
    times: int
    most: int
    """Of one rank."""


@dataclass(frozen=True)
class Verdict:
    """Of a rehearsal."""

    config: RunConfig
    logs: tuple[RankLog, ...]

    @cached_property
    def faults(self) -> tuple[Fault, ...]:
        """All of them, those that would end the run first; none is a launch that may be tried."""
        found = list(grouped({log.rank: [*log.findings, *step_findings(log)] for log in self.logs}))
        found += [*hangs(self.logs), *compare(self.logs)]
        return tuple(sorted(found, key=lambda fault: _FIRST.index(fault.kind) if fault.kind in _FIRST else len(_FIRST)))

    @property
    def exit_code(self) -> int:
        """Of the verb: 0 for nothing found, 1 for findings."""
        return 1 if self.faults else 0

    @property
    def mismatches(self) -> int:
        """Communicators and pairs of ranks on which two logs do not agree."""
        return sum(fault.kind in ("collective", "message") for fault in self.faults)

    @property
    def cut(self) -> tuple[int, ...]:
        """Ranks whose step raised: the connection model has not run."""
        return tuple(log.rank for log in self.logs if ends_early(log))

    @cached_property
    def compared(self) -> tuple[int, int]:
        """Collectives that more than one rehearsed rank has logged, and messages between rehearsed ranks."""
        shared = [rows for rows in collectives_of(self.logs).values() if len(rows) > 1]
        sent, _ = messages_of(self.logs)
        return sum(max(map(len, rows.values())) for rows in shared), sum(map(len, sent.values()))

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Of all ranks, each once."""
        return tuple(dict.fromkeys(text for log in self.logs for text in log.assumptions))

    @cached_property
    def phases(self) -> list[Count]:
        """See `by_phase`."""
        return by_phase(self.config, stages_of(self.config), self.logs)

    @property
    def layer_pair(self) -> dict[str, tuple[float, float]]:
        """See `counted.layer_pair`."""
        return layer_pair(self.phases)

    @property
    def passes(self) -> list[Count]:
        """See `by_operation`."""
        return by_operation(self.config, stages_of(self.config), self.logs)

    @property
    def host_reads(self) -> list[HostReads]:
        """By line of code, the most frequent first."""
        times: Counter[tuple[str, str, bool]] = Counter()
        most: dict[tuple[str, str, bool], int] = {}
        for log in self.logs:
            own = Counter((line_of(e.place), e.reason, e.is_inside_pair) for e in host_waits(log))
            times += own
            most |= {key: max(count, most.get(key, 0)) for key, count in own.items()}
        return [HostReads(*key, count, most[key]) for key, count in times.most_common()]

    @property
    def phase_memory(self) -> dict[str, tuple[int, int]]:
        """Of each phase the most bytes that are alive on any rank, and that rank; the largest first."""
        fullest: dict[str, tuple[int, int]] = {}
        for log in self.logs:
            for phase, size in log.memory.by_phase.items():
                fullest[phase] = max(fullest.get(phase, (-1, -1)), (size, log.rank))
        return dict(sorted(fullest.items(), key=lambda item: -item[1][0]))


def collectives(log: RankLog) -> int:
    """Return how many the rank launches, those that only connect included."""
    return sum(isinstance(event, Collective) for event in log.events)


def batches(log: RankLog) -> int:
    """Return how many P2P batches the rank launches, those that only connect included."""
    return sum(isinstance(event, MessageBatch) for event in log.events)


def host_waits(log: RankLog) -> Iterator[HostWait]:
    """Return where the host of the rank waits for its device in the step."""
    return (event for event in log.events if isinstance(event, HostWait) and not event.is_warm_up)


def judge(config: RunConfig, logs: Sequence[RankLog]) -> Verdict:
    """Return the verdict on logs of ranks of the run."""
    return Verdict(config, tuple(logs))
