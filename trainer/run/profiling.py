"""When a run looks closely at a step, and what it does with what it sees."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch

from ..build import Rank
from ..telemetry.memory_usage import memory_use, memory_values
from ..telemetry.sample import StepSample
from ..telemetry.trace import merge_ranks, summarize_trace, trace_values, write_rank
from .reporter import Reporter

TRACE_FOLDER = "trace"


class Profiling:
    """Looks at one step in `terms_every`, and writes a timeline of some steps if the run is traced.

    The first step of a launch warms up, and is not looked at unless it is the only one.
    """

    def __init__(self, rank: Rank, done: int) -> None:
        """For a launch that goes on after `done` steps."""
        total, telemetry = rank.config.total_steps, rank.config.telemetry
        self._rank = rank
        self._second = min(done + 2, total)
        self._last = min(self._second + telemetry.trace_steps - 1, total) if telemetry.trace else 0
        self._every = telemetry.terms_every
        self._begin = 0

    def before(self, step: int) -> None:
        """Step number `step` is about to begin."""
        trace = self._rank.trace
        trace.on = self._is_traced(step) or self._is_sampled(step)
        self._begin = len(trace.spans)

    def after(self, step: int, seconds: float, reporter: Reporter | None) -> None:
        """Step number `step` has taken so long. Collective if it was looked at."""
        trace = self._rank.trace
        trace.on = False
        with nullcontext() if reporter is None else reporter.telling():
            if self._is_sampled(step):
                self._sample(step, seconds, reporter)
            if step == self._last:
                self._write(step, reporter)
        if not self._is_traced(step) or step == self._last:
            trace.spans.clear()

    def _is_traced(self, step: int) -> bool:
        return self._second <= step <= self._last

    def _is_sampled(self, step: int) -> bool:
        return step == self._second or (step > self._second and step % self._every == 0)

    def _sample(self, step: int, seconds: float, reporter: Reporter | None) -> None:
        """Add up what all ranks have spent this step on, and ask each for its memory; the first one notes it."""
        rank = self._rank
        own = StepSample.of(rank.trace.spans[self._begin :], seconds)
        numbers = rank.groups.control.all_reduce_sum(torch.tensor(own.numbers()), "times of a step by term")
        memory = rank.groups.control.all_gather_objects(memory_use(rank.device), "memory of the ranks")
        if reporter is not None:
            total = StepSample.from_numbers(numbers.tolist())
            by_term = total.by_term(rank.stepper.executor.program, rank.config.topology.dp)
            reporter.terms(step, total.step_us, by_term)
            reporter.memory(step, memory_values(rank.device, memory))

    def _write(self, step: int, reporter: Reporter | None) -> None:
        """Write all ranks' timelines; a disk that does not take them ends the trace, not the run."""
        rank = self._rank
        folder = Path(rank.config.training.run_dir) / TRACE_FOLDER
        failure = None
        try:
            write_rank(folder, rank.groups.rank, rank.trace.spans)
        except OSError as error:
            failure = str(error)
        # Every rank's file is written when the last one's summary is here.
        summary = summarize_trace(rank.trace.spans)
        gathered = rank.groups.control.all_gather_objects((summary, failure), "summaries of the trace")
        if reporter is None:
            return
        try:
            if failures := [each for _, each in gathered if each is not None]:
                raise OSError(failures[0])
            path = merge_ranks(folder, rank.groups.world.size)
        except OSError as error:
            reporter.warn(step, f"the timeline could not be written: {error}", about="trace")
        else:
            reporter.trace(step, path, trace_values([summary for summary, _ in gathered]))
