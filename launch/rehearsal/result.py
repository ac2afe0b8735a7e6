"""What a rehearsal has found over all of its ranks, and every figure that it prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from ...trainer.build import build_stage_layout
from ...trainer.config import RunConfig
from .checks import check_step
from .compare import compare_rank_logs
from .deadlock.communicators import group_collectives, group_p2p_ops
from .deadlock.diagnosis import find_hangs
from .findings import RunFinding, code_line, group_findings, has_raised
from .launch_counts import MeanKernelLaunches, mean_launches_by_operation, mean_launches_by_phase, moe_layer_totals
from .log import CollectiveRecord, HostWait, P2PBatchRecord, RankLog

_FIRST = ("error", "device", "hang", "first contact", "collective", "message")
"""Kinds of faults that end a run, in the order in which they are told; what is only slow or large comes behind."""


@dataclass(frozen=True)
class HostWaitSummary:
    """Waits of the host at one line of our code, over all rehearsed ranks."""

    line: str
    reason: str
    is_inside_pair: bool
    times: int
    most: int
    """Of one rank."""


@dataclass(frozen=True)
class RehearsalResult:
    """Of a rehearsal."""

    config: RunConfig
    logs: tuple[RankLog, ...]

    @cached_property
    def findings(self) -> tuple[RunFinding, ...]:
        """All of them, those that would end the run first; none is a launch that may be tried."""
        found = list(group_findings({log.rank: [*log.findings, *check_step(log)] for log in self.logs}))
        found += [*find_hangs(self.logs), *compare_rank_logs(self.logs)]
        return tuple(sorted(found, key=lambda fault: _FIRST.index(fault.kind) if fault.kind in _FIRST else len(_FIRST)))

    @property
    def exit_code(self) -> int:
        """Of the verb: 0 for nothing found, 1 for findings."""
        return 1 if self.findings else 0

    @property
    def mismatch_count(self) -> int:
        """Communicators and pairs of ranks on which two logs do not agree."""
        return sum(fault.kind in ("collective", "message") for fault in self.findings)

    @property
    def failed_ranks(self) -> tuple[int, ...]:
        """Ranks whose step raised: the connection model has not run."""
        return tuple(log.rank for log in self.logs if has_raised(log))

    @cached_property
    def compared_counts(self) -> tuple[int, int]:
        """Collectives that more than one rehearsed rank has logged, and messages between rehearsed ranks."""
        shared = [rows for rows in group_collectives(self.logs).values() if len(rows) > 1]
        sent, _ = group_p2p_ops(self.logs)
        return sum(max(map(len, rows.values())) for rows in shared), sum(map(len, sent.values()))

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Of all ranks, each once."""
        return tuple(dict.fromkeys(text for log in self.logs for text in log.assumptions))

    @cached_property
    def launches_by_phase(self) -> list[MeanKernelLaunches]:
        """See `mean_launches_by_phase`."""
        return mean_launches_by_phase(self.config, build_stage_layout(self.config), self.logs)

    @property
    def moe_layer_totals(self) -> dict[str, tuple[float, float]]:
        """See `counted.moe_layer_totals`."""
        return moe_layer_totals(self.launches_by_phase)

    @property
    def launches_by_operation(self) -> list[MeanKernelLaunches]:
        """See `mean_launches_by_operation`."""
        return mean_launches_by_operation(self.config, build_stage_layout(self.config), self.logs)

    @property
    def host_wait_summaries(self) -> list[HostWaitSummary]:
        """By line of code, the most frequent first."""
        times: Counter[tuple[str, str, bool]] = Counter()
        most: dict[tuple[str, str, bool], int] = {}
        for log in self.logs:
            own = Counter((code_line(e.code_location), e.reason, e.is_inside_fb) for e in step_host_waits(log))
            times += own
            most |= {key: max(count, most.get(key, 0)) for key, count in own.items()}
        return [HostWaitSummary(*key, count, most[key]) for key, count in times.most_common()]

    @property
    def peak_bytes_by_phase(self) -> dict[str, tuple[int, int]]:
        """Of each phase the most bytes that are alive on any rank, and that rank; the largest first."""
        fullest: dict[str, tuple[int, int]] = {}
        for log in self.logs:
            for phase, size in log.memory.by_phase.items():
                fullest[phase] = max(fullest.get(phase, (-1, -1)), (size, log.rank))
        return dict(sorted(fullest.items(), key=lambda item: -item[1][0]))


def count_collectives(log: RankLog) -> int:
    """Return how many the rank launches, those that only connect included."""
    return sum(isinstance(event, CollectiveRecord) for event in log.events)


def count_p2p_batches(log: RankLog) -> int:
    """Return how many P2P batches the rank launches, those that only connect included."""
    return sum(isinstance(event, P2PBatchRecord) for event in log.events)


def step_host_waits(log: RankLog) -> Iterator[HostWait]:
    """Return where the host of the rank waits for its device in the step."""
    return (event for event in log.events if isinstance(event, HostWait) and not event.is_warm_up)


def evaluate_rank_logs(config: RunConfig, logs: Sequence[RankLog]) -> RehearsalResult:
    """Return the verdict on logs of ranks of the run."""
    return RehearsalResult(config, tuple(logs))
