"""Result of a rehearsal over all of its ranks: the findings and the printed figures."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ...trainer.config import RunConfig
from .checks import check_step
from .compare import compare_rank_logs
from .deadlock.communicators import group_collectives, group_p2p_ops
from .deadlock.diagnosis import find_hangs
from .findings import RunFinding, code_line_of_location, group_findings, has_raised
from .launch_counts import MeanKernelLaunches, mean_launches
from .log import HostWait, RankLog

_FATAL_KINDS = ("error", "device", "hang", "first contact", "collective", "message")
"""Kinds of findings that end a run, in the order in which they are printed, before those that cost time or memory."""


@dataclass(frozen=True)
class HostWaitSummary:
    """Host waits at one code line, over all rehearsed ranks."""

    code_line: str
    reason: str
    is_inside_fb: bool
    count: int
    max_per_rank: int
    """Maximum over the ranks."""


@dataclass(frozen=True)
class RehearsalResult:
    """Result of a rehearsal."""

    config: RunConfig
    logs: tuple[RankLog, ...]

    @cached_property
    def findings(self) -> tuple[RunFinding, ...]:
        """All findings, those that would end the run first; without any, the run may be started."""
        found = list(group_findings({log.rank: [*log.findings, *check_step(log)] for log in self.logs}))
        found += [*find_hangs(self.logs), *compare_rank_logs(self.logs)]
        order = {kind: number for number, kind in enumerate(_FATAL_KINDS)}
        return tuple(sorted(found, key=lambda finding: order.get(finding.kind, len(order))))

    @property
    def mismatch_count(self) -> int:
        """Number of communicators and pairs of ranks on which two logs differ."""
        return sum(finding.kind in ("collective", "message") for finding in self.findings)

    @property
    def failed_ranks(self) -> tuple[int, ...]:
        """Ranks whose step raised; with any, the deadlock check does not run."""
        return tuple(log.rank for log in self.logs if has_raised(log))

    @cached_property
    def compared_counts(self) -> tuple[int, int]:
        """Number of collectives that several rehearsed ranks logged, and of messages between rehearsed ranks."""
        shared = [rows for rows in group_collectives(self.logs).values() if len(rows) > 1]
        sent, _ = group_p2p_ops(self.logs)
        return sum(max(map(len, rows.values())) for rows in shared), sum(map(len, sent.values()))

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Assumptions of all ranks, without repetition."""
        return tuple(dict.fromkeys(text for log in self.logs for text in log.assumptions))

    @cached_property
    def launches_by_phase(self) -> list[MeanKernelLaunches]:
        """Mean launches by phase and stream, in the order of the first launch."""
        return mean_launches(self.config, self.logs, lambda row: (row.phase, row.stream, "", ""))

    @property
    def launches_by_operation(self) -> list[MeanKernelLaunches]:
        """Mean launches by operation and code location, those that move the most bytes first."""
        counts = mean_launches(
            self.config, self.logs, lambda row: (row.phase, row.stream, row.operation, row.code_location)
        )
        return sorted(counts, key=lambda count: -count.bytes)

    @property
    def host_wait_summaries(self) -> list[HostWaitSummary]:
        """Host waits by code line, the most frequent first."""
        by_rank = [
            Counter((code_line_of_location(e.code_location), e.reason, e.is_inside_fb) for e in step_host_waits(log))
            for log in self.logs
        ]
        total: Counter[tuple[str, str, bool]] = sum(by_rank, Counter())
        return [
            HostWaitSummary(*key, count, max(counts[key] for counts in by_rank)) for key, count in total.most_common()
        ]

    @property
    def peak_bytes_by_phase(self) -> dict[str, tuple[int, int]]:
        """Peak live bytes of each phase over the ranks, and that rank; the largest first."""
        largest: dict[str, tuple[int, int]] = {}
        for log in self.logs:
            for phase, size in log.memory.peak_bytes_by_phase.items():
                largest[phase] = max(largest.get(phase, (-1, -1)), (size, log.rank))
        return dict(sorted(largest.items(), key=lambda item: -item[1][0]))


def step_host_waits(log: RankLog) -> Iterator[HostWait]:
    """Yield the waits of the rank's host for its device in the step."""
    return (event for event in log.events_of(HostWait) if not event.is_warm_up)
