"""A step's time by term over all ranks, and the share of waiting that an ideal run has too."""

import pytest

from shoestring.comm.trace import EXPOSED_ALL_TO_ALL, GRADIENT_SYNC_WAIT, PIPELINE_WAIT, TimelineTrack
from shoestring.parallelism.pipeline.schedules.registry import build_program
from shoestring.parallelism.pipeline.simulate import OpDurations, simulate_program
from shoestring.trainer.ledger.terms import STEP_TIME_TERMS
from shoestring.trainer.telemetry.step_times import StepTimes
from shoestring.trainer.telemetry.trace import Span

US = 1000
PROGRAM = build_program("1f1b", 4, 8)
TIMES = OpDurations(forward=100, backward=200)


def step_of(rank: int, slower: int = 0) -> StepTimes:
    """Return times as in the simulation, except for `slower` microseconds more of waiting."""
    ideal = simulate_program(PROGRAM, TIMES)
    spans, before = [], 0
    for instruction, start, end in zip(
        PROGRAM.instructions[rank], ideal.start_times[rank], ideal.end_times[rank], strict=True
    ):
        spans.append(Span(TimelineTrack.INSTRUCTION, PIPELINE_WAIT, "", before * US, int(start) * US))
        spans.append(Span(TimelineTrack.INSTRUCTION, instruction.op, "", int(start) * US, int(end) * US))
        spans.append(Span(TimelineTrack.COMPUTE, EXPOSED_ALL_TO_ALL, "", int(end - 10) * US, int(end) * US))
        before = int(end)
    late = before + slower
    spans += [Span(TimelineTrack.INSTRUCTION, PIPELINE_WAIT, "", before * US, late * US)]
    spans += [Span(TimelineTrack.INSTRUCTION, GRADIENT_SYNC_WAIT, "", late * US, (late + 50) * US)]
    return StepTimes.from_spans(spans, (late + 50) / 1e6)


def total(slower: int) -> StepTimes:
    numbers = zip(*(step_of(rank, slower if rank == 2 else 0).to_list() for rank in range(4)), strict=True)
    return StepTimes.from_list([sum(of_ranks) for of_ranks in numbers])


def test_the_terms_of_all_ranks_add_up_to_their_steps() -> None:
    sample = total(0)
    terms = dict(zip(STEP_TIME_TERMS, sample.terms_us, strict=True))
    assert sum(sample.terms_us) == sample.step_us
    assert (terms["F"], terms["B"], terms["exposed_all_to_all"]) == (4 * 8 * 90, 4 * 8 * 190, 4 * 16 * 10)
    assert terms["gradient_sync_wait"] == 4 * 50


@pytest.mark.parametrize("slower", [0, 700])
def test_waiting_is_bubble_as_far_as_the_ideal_goes_and_imbalance_beyond(slower: int) -> None:
    sample = total(slower)
    ideal = simulate_program(PROGRAM, TIMES)
    bubble = sum(ends[-1] - busy for ends, busy in zip(ideal.end_times, ideal.busy_time_per_rank, strict=True))
    split = sample.us_by_term(PROGRAM, replicas=1)
    assert split["bubble"] == bubble > 0
    assert split["pipeline_wait"] - split["bubble"] == slower


def test_more_is_never_bubble_than_was_waited() -> None:
    sample = total(0)
    assert sample.us_by_term(PROGRAM, replicas=5)["bubble"] == sample.us_by_term(PROGRAM, replicas=1)["pipeline_wait"]


def test_a_rank_that_does_nothing_has_no_time() -> None:
    sample = StepTimes.from_spans([], 0.0)
    assert set(sample.to_list()) == {0}
    assert sample.us_by_term(build_program("gpipe", 1, 1), 1)["bubble"] == 0
