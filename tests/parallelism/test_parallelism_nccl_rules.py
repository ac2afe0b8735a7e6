"""Every schedule trains under NCCL's rules, with the classes that GPUs use, and equals the plain reference."""

import pytest

from shoestring.parallelism.pipeline.communication import derive_p2p_batches
from shoestring.parallelism.pipeline.placement import Direction
from shoestring.parallelism.pipeline.program import PipelineProgram
from shoestring.parallelism.pipeline.schedules.registry import SCHEDULES, build_forward_program, build_program
from shoestring.tests.comm.nccl_rules import FIRST_CONTACT
from shoestring.tests.launch.small_run import SMALL
from shoestring.tests.parallelism.nccl_runs import MATRIX, Start, errors_of, failure_of, open_and_step
from shoestring.tests.parity.layouts import Layout
from shoestring.tests.processes import run_processes

SHARED_EMBEDDING = Layout(1, 1, 4, 1, pp=2, schedule="1f1b")
"""MTP embeds tokens on the last stage: its embedding's gradient is summed with that of the first."""


def identifier(layout: Layout) -> str:
    return f"{layout.schedule}-pp{layout.pp}-mtp{layout.mtp}"


def is_quick(layout: Layout) -> bool:
    return (layout.pp, layout.mtp) == (2, 1)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(each, marks=[] if is_quick(each) else [pytest.mark.slow]) for each in MATRIX],
    ids=identifier,
)
def test_a_schedule_trains_under_the_rules(layout: Layout) -> None:
    errors = errors_of(layout)
    assert not errors.over(layout.tolerance), errors


def test_without_a_warm_up_a_receive_ahead_hangs() -> None:
    failure = failure_of(SHARED_EMBEDDING, Start.COLD)
    assert "of micro-batch 0 from rank" in failure
    assert FIRST_CONTACT in failure


def test_with_pairs_alone_sends_after_the_listener_hang() -> None:
    failure = failure_of(SHARED_EMBEDDING, Start.PAIRS, late_sends=True)
    assert failure.startswith("rank 1: sum of gradients, dense of stage 0 and 1 with ranks 0 failed")
    assert FIRST_CONTACT in failure


def test_with_pairs_alone_sends_before_the_listener_do_not() -> None:
    assert failure_of(SHARED_EMBEDDING, Start.PAIRS, patience=60) == ""


def pairs(program: PipelineProgram) -> set[tuple[Direction, int, int]]:
    """Return the ranks that send to each other, by direction."""
    sent = (op for commits in derive_p2p_batches(program) for commit in commits for op in commit.sends)
    return {(op.direction, op.source.rank, op.target.rank) for op in sent}


@pytest.mark.parametrize(("schedule", "pp"), [(each.name, pp) for each in SCHEDULES for pp in (2, 4)])
def test_programs_of_other_batches_and_of_evaluation_meet_no_other_ranks(schedule: str, pp: int) -> None:
    warmed_up = build_program(schedule, pp, 2 * pp)
    assert pairs(build_program(schedule, pp, 4 * pp)) == pairs(warmed_up)
    assert pairs(build_forward_program(warmed_up.placement, 1)) <= pairs(warmed_up)


def test_an_engine_connects_what_its_configuration_communicates_over() -> None:
    pipeline = ["topology.pp=2", "model.num_hidden_layers=4", "training.global_batch_size=16"]
    overrides = [*SMALL, *pipeline, "exchange=two_hop", "topology.gpus_per_node=1"]
    first, *others = run_processes(4, open_and_step, overrides)
    assert others == [first] * 3
