"""The directory of a run of two pipeline ranks, written without training."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

from shoestring.comm.trace import OPTIMIZER, PIPELINE_WAIT, TimelineTrack
from shoestring.launch.answers.page import html_page
from shoestring.launch.compose import compose_run_config
from shoestring.launch.report.page import report_answer
from shoestring.launch.report.run_record import read_run_record
from shoestring.launch.run.run_dir import create_run_dir
from shoestring.parallelism.pipeline.program import PipelineProgram
from shoestring.parallelism.pipeline.schedules.registry import build_program
from shoestring.parallelism.pipeline.simulate import OpDurations, simulate_program
from shoestring.tests.launch.report.reader import Reader
from shoestring.tests.trainer.telemetry.written_events import RUN, STEP, write
from shoestring.trainer.config import RunConfig
from shoestring.trainer.ledger.allocation_journal import AllocationJournal
from shoestring.trainer.ledger.clock import Instant
from shoestring.trainer.ledger.config import BudgetConfig
from shoestring.trainer.ledger.terms import STEP_TIME_TERMS
from shoestring.trainer.ledger.work_journal import WorkJournal
from shoestring.trainer.telemetry.events import (
    Event,
    LossEvaluated,
    MemoryMeasured,
    RunResumed,
    RunStopped,
    StepLogged,
    TextSampled,
    WarningRaised,
)
from shoestring.trainer.telemetry.memory_usage import RESIDENT_LABEL
from shoestring.trainer.telemetry.trace import Span, merge_rank_traces, write_rank_trace

STEPS, TOKENS, LAST = 8, 1000, 4.25
BUDGET = BudgetConfig(gpu_hours=4.0)
BEGAN = 1_800_000_000


class Clock:
    """The ledger's clock; it moves only when a test says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> Instant:
        ns = round(self.seconds * 1e9)
        return Instant((BEGAN * 10**9) + ns, ns, "boot")

    @contextmanager
    def told(self) -> Iterator[None]:
        with mock.patch.object(Instant, "now", self.now):
            yield


def config(run_dir: Path) -> RunConfig:
    composed = compose_run_config(["experiment=quickstart"])
    return replace(composed, training=replace(composed.training, run_dir=str(run_dir)))


def program(run_dir: Path) -> PipelineProgram:
    described = config(run_dir)
    return build_program(described.schedule.name, described.topology.pp, described.num_micro_batches)


def record_run(run_dir: Path) -> None:
    """Write two launches of eight steps in all; the first dies after step 6 and the second resumes from step 4."""
    create_run_dir(run_dir)
    clock = Clock()
    with clock.told():
        first = AllocationJournal(run_dir, ranks=2, attempt="first", budget=BUDGET, heartbeat_seconds=1000)
        record_attempt(run_dir, clock, "first", range(1, 7), resumed=None)
        first.close("a rank died (torchrun exit code 1)")
        second = AllocationJournal(run_dir, ranks=2, attempt="second", budget=BUDGET, heartbeat_seconds=1000)
        record_attempt(run_dir, clock, "second", range(5, STEPS + 1), resumed=4)
        second.close(f"{STEPS} steps done")
    write(run_dir, *events(run_dir))


def record_attempt(run_dir: Path, clock: Clock, attempt: str, steps: range, resumed: int | None) -> None:
    """Record an attempt: each step takes both ranks 324 s, the evaluation at the end 360 s."""
    work = WorkJournal(run_dir, ranks=2, attempt=attempt, budget=BUDGET)
    if resumed is not None:
        work.record_resume(resumed)
    work.record_ready()
    for step in steps:
        clock.seconds += 324
        work.record_step(step, 324_000, TOKENS)
        work.record_step_time_terms(step, 200, dict.fromkeys(STEP_TIME_TERMS, 20) | {"bubble": 15})
    if steps.stop == STEPS + 1:
        clock.seconds += 360
        work.record_interval("evaluation", 360_000)
    work.close(clean=resumed is not None)


def events(run_dir: Path) -> Iterator[Event]:
    sizes: Any = {"parameters": 3_500_000, "active_parameters": 1_700_000}
    run = replace(RUN, config=asdict(config(run_dir)), ranks=2, total_steps=STEPS, time=BEGAN, **sizes)
    yield run
    for number in range(1, 7):
        yield step(number, loss=9.0 - number)
    yield WarningRaised(step=6, about="spike", message="the loss <script>alert(1)</script> jumped", time=BEGAN + 2)
    yield replace(run, time=BEGAN + 5000)
    yield RunResumed(step=4, time=BEGAN + 5001)
    for number in range(5, STEPS + 1):
        yield step(number, loss=LAST + STEPS - number)
    now, peak = (300_000_000, 200_000_000), (420_000_000, 310_000_000)
    yield MemoryMeasured(step=STEPS, quantity=RESIDENT_LABEL, limit=None, now=now, peak=peak, time=BEGAN + 6000)
    yield LossEvaluated(step=STEPS, loss=4.5, targets=640, unigram_entropy=5.83, time=BEGAN + 6001)
    yield TextSampled(step=STEPS, text="BRUTUS\nSpeak, hands & <b>feet</b>", time=BEGAN + 6002)
    yield RunStopped(step=STEPS, reason="done", time=BEGAN + 6003)


def step(number: int, loss: float = math.nan) -> StepLogged:
    return replace(
        STEP,
        step=number,
        loss=loss,
        mtp_loss=loss + 0.5,
        learning_rate=1e-3,
        grad_norm=1.5,
        metrics={"tokens_per_expert/layer_01": [0, 100, 200, 100], "load/max_violation": 1.0},
        tokens=number * TOKENS,
        tokens_per_second=2000.0,
        mfu=0.25,
        gpu_hours=0.18 * number,
        budget_share=0.045 * number,
        budget_left=4 - 0.18 * number,
        projected_gpu_hours=1.5,
        eta_seconds=60.0,
        total_steps=STEPS,
        time=BEGAN + number,
    )


def record_trace(run_dir: Path, steps: int = 2) -> None:
    """Write the traces of both ranks of the first replica; in step k each instruction (F, B, I, W, FB) takes k ms."""
    columns = config(run_dir).topology.dp
    spans: list[list[Span]] = [[] for _ in range(2)]
    start = 10**12
    for number in range(1, steps + 1):
        timeline = simulate_program(program(run_dir), OpDurations(1e6, 1e6, 1e6, 1e6, 1e6), transfer_time=0)
        rows = zip(timeline.program.instructions, timeline.start_times, timeline.end_times, strict=True)
        for rank, (instructions, starts, ends) in enumerate(rows):
            for instruction, begin, end in zip(instructions, starts, ends, strict=True):
                at = (start + round(number * begin), start + round(number * end))
                spans[rank].append(Span(TimelineTrack.INSTRUCTION, instruction.op, str(instruction), *at))
                spans[rank].append(Span(TimelineTrack.INSTRUCTION, PIPELINE_WAIT, "a message", at[0], at[0]))
        start += 10**9
        for row in spans:
            row.append(Span(TimelineTrack.INSTRUCTION, OPTIMIZER, "", start - 10**6, start))
    for rank in range(2 * columns):
        write_rank_trace(run_dir / "trace", rank, spans[rank // columns])
    merge_rank_traces(run_dir / "trace", 2 * columns)


def report_of(run_dir: Path) -> Reader:
    return Reader(html_page(report_answer(read_run_record(run_dir)), "shoestring report"))
