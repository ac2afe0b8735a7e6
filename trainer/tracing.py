"""When a traced run records, and what it does with the record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .rank import Rank
from .reporter import Reporter
from .telemetry.trace import merge_ranks, summarise_trace, trace_values, write_rank

TRACE_FOLDER = "trace"


@dataclass(frozen=True)
class Tracing:
    """Records some steps of a launch: those after its first one, which warms up."""

    rank: Rank
    first: int
    last: int

    @staticmethod
    def of(rank: Rank, done: int) -> Tracing:
        """For a launch that goes on after `done` steps; the last ones there are where it is a short one."""
        total, count = rank.config.total_steps, rank.config.telemetry.trace_steps
        first = min(done + 2, total)
        return Tracing(rank, first, min(first + count - 1, total))

    def before(self, step: int) -> None:
        """Step number `step` is about to begin."""
        if self.rank.trace is not None:
            self.rank.trace.on = self.first <= step <= self.last

    def after(self, step: int, reporter: Reporter | None) -> None:
        """Step number `step` is done. Collective when it was the last one recorded: write all ranks' timelines."""
        trace, groups = self.rank.trace, self.rank.groups
        if trace is None or step != self.last:
            return
        trace.on = False
        folder = Path(self.rank.config.training.run_dir) / TRACE_FOLDER
        write_rank(folder, groups.rank, trace.spans)
        # Every rank's file is written when the last one's summary is here.
        summaries = groups.world.all_gather_objects(summarise_trace(trace.spans), "summaries of the trace")
        trace.spans.clear()
        if reporter is not None:
            path = merge_ranks(folder, groups.world.size)
            reporter.trace(step, path, trace_values(summaries))
