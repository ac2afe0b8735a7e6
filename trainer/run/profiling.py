"""When a run looks closely at a step, and what it does with what it sees."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch

from ..build import RankResources
from ..telemetry.memory_usage import measure_memory, memory_metrics
from ..telemetry.step_times import StepTimes
from ..telemetry.trace import merge_rank_traces, summarize_trace, trace_metrics, write_rank_trace
from .reporter import Reporter

TRACE_FOLDER = "trace"


class StepProfiler:
    """Looks at one step in `terms_every`, and writes a timeline of some steps if the run is traced.

    The first step of a launch warms up, and is not looked at unless it is the only one.
    """

    def __init__(self, rank: RankResources, done: int) -> None:
        """For a launch that goes on after `done` steps."""
        total, telemetry = rank.config.total_steps, rank.config.telemetry
        self._rank = rank
        self._second = min(done + 2, total)
        self._last = min(self._second + telemetry.trace_steps - 1, total) if telemetry.trace else 0
        self._every = telemetry.terms_every
        self._begin = 0

    def before_step(self, step: int) -> None:
        """Step number `step` is about to begin."""
        trace = self._rank.trace_recorder
        trace.is_recording = self._is_traced(step) or self._is_sampled(step)
        self._begin = len(trace.spans)

    def after_step(self, step: int, seconds: float, reporter: Reporter | None) -> None:
        """Step number `step` has taken so long. Collective if it was looked at."""
        trace = self._rank.trace_recorder
        trace.is_recording = False
        with nullcontext() if reporter is None else reporter.logging_overhead():
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
        own = StepTimes.from_spans(rank.trace_recorder.spans[self._begin :], seconds)
        numbers = rank.groups.world_cpu.all_reduce_sum(torch.tensor(own.to_list()), "times of a step by term")
        memory = rank.groups.world_cpu.all_gather_objects(measure_memory(rank.device), "memory of the ranks")
        if reporter is not None:
            total = StepTimes.from_list(numbers.tolist())
            by_term = total.us_by_term(rank.stepper.executor.program, rank.config.topology.dp)
            reporter.report_step_time_terms(step, total.step_us, by_term)
            reporter.report_memory(step, memory_metrics(rank.device, memory))

    def _write(self, step: int, reporter: Reporter | None) -> None:
        """Write all ranks' timelines; a disk that does not take them ends the trace, not the run."""
        rank = self._rank
        folder = Path(rank.config.training.run_dir) / TRACE_FOLDER
        failure = None
        try:
            write_rank_trace(folder, rank.groups.rank, rank.trace_recorder.spans)
        except OSError as error:
            failure = str(error)
        # Every rank's file is written when the last one's summary is here.
        summary = summarize_trace(rank.trace_recorder.spans)
        gathered = rank.groups.world_cpu.all_gather_objects((summary, failure), "summaries of the trace")
        if reporter is None:
            return
        try:
            if failures := [each for _, each in gathered if each is not None]:
                raise OSError(failures[0])
            path = merge_rank_traces(folder, rank.groups.world.size)
        except OSError as error:
            reporter.warn(step, f"the timeline could not be written: {error}", about="trace")
        else:
            reporter.report_trace(step, path, trace_metrics([summary for summary, _ in gathered]))
