"""Sampling of step times and memory, and the timeline of a traced run."""

from pathlib import Path

import torch

from ..build import RankResources
from ..telemetry.memory_usage import measure_memory, memory_event
from ..telemetry.step_times import StepTimes
from ..telemetry.trace import merge_rank_traces, summarize_trace, trace_metrics, write_rank_trace
from .reporter import Reporter

TRACE_FOLDER = "trace"


class StepProfiler:
    """Sampler of every `telemetry.terms_every`-th step; writes a timeline of some steps if the run is traced."""

    def __init__(self, rank: RankResources, done: int) -> None:
        """Profile a launch that starts after `done` steps."""
        # The first step of a launch warms up, so sampling starts at the second one, unless there is only one.
        total, telemetry = rank.config.total_steps, rank.config.telemetry
        self._rank = rank
        self._second = min(done + 2, total)
        self._last = min(self._second + telemetry.trace_steps - 1, total) if telemetry.trace else 0
        self._every = telemetry.terms_every
        self._first_span = 0

    def before_step(self, step: int) -> None:
        """Start recording spans if step number `step` is sampled or traced."""
        trace = self._rank.trace_recorder
        trace.is_recording = self._is_traced(step) or self._is_sampled(step)
        self._first_span = len(trace.spans)

    def after_step(self, step: int, seconds: float, reporter: Reporter) -> None:
        """Record the times of step number `step`, which took `seconds`. Collective if it was sampled or traced."""
        trace = self._rank.trace_recorder
        trace.is_recording = False
        with reporter.logging_overhead():
            if self._is_sampled(step):
                self._sample(step, seconds, reporter)
            if step == self._last:
                self._write(step, reporter)
        # Spans of traced steps are kept until the file is written; those of other steps would only use memory.
        if not self._is_traced(step) or step == self._last:
            trace.spans.clear()

    def _is_traced(self, step: int) -> bool:
        return self._second <= step <= self._last

    def _is_sampled(self, step: int) -> bool:
        return step == self._second or (step > self._second and step % self._every == 0)

    def _sample(self, step: int, seconds: float, reporter: Reporter) -> None:
        """Sum the step times and gather the memory of all ranks; rank 0 reports them."""
        rank = self._rank
        local_times = StepTimes.from_spans(rank.trace_recorder.spans[self._first_span :], seconds)
        numbers = rank.groups.world_cpu.all_reduce_sum(torch.tensor(local_times.to_list()), "times of a step by term")
        memory = rank.groups.world_cpu.all_gather_objects(measure_memory(rank.device), "memory of the ranks")
        total = StepTimes.from_list(numbers.tolist())
        by_term = total.us_by_term(rank.engine.stepper.executor.program, rank.config.topology.dp)
        reporter.report_step_time_terms(step, total.step_us, by_term)
        reporter.report_memory(memory_event(step, rank.device, memory))

    def _write(self, step: int, reporter: Reporter) -> None:
        """Write the timelines of all ranks; a disk error is reported as a warning."""
        rank = self._rank
        folder = Path(rank.config.training.run_dir) / TRACE_FOLDER
        failure = None
        try:
            write_rank_trace(folder, rank.groups.rank, rank.trace_recorder.spans)
        except OSError as error:
            failure = str(error)
        # The gather is also a barrier: when it returns, every rank has written its file, and rank 0 may merge them.
        summary = summarize_trace(rank.trace_recorder.spans)
        gathered = rank.groups.world_cpu.all_gather_objects((summary, failure), "summaries of the trace")
        if not rank.groups.world.is_first_rank:
            return
        try:
            if failures := [each for _, each in gathered if each is not None]:
                raise OSError(failures[0])
            path = merge_rank_traces(folder, rank.groups.world.size)
        except OSError as error:
            reporter.warn(step, f"the timeline could not be written: {error}", about="trace")
        else:
            reporter.report_trace(step, path, trace_metrics([summary for summary, _ in gathered]))
