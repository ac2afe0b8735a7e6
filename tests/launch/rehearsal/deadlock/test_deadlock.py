"""Every schedule hangs on NCCL without a warm-up and finishes with one."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from shoestring.launch.rehearsal.deadlock.diagnosis import find_hangs
from shoestring.launch.rehearsal.log import CollectiveRecord
from shoestring.parallelism.pipeline.placement import Direction
from shoestring.parallelism.pipeline.schedules.registry import build_program
from shoestring.tests.launch.rehearsal.deadlock.hanging import only
from shoestring.tests.launch.rehearsal.logs import collective, program_logs

SCHEDULES = [
    ("gpipe", 4, 8),
    ("1f1b", 2, 4),
    ("1f1b", 4, 8),
    ("interleaved", 4, 8),
    ("zb_h1", 4, 8),
    ("dualpipe", 2, 4),
    ("dualpipe", 4, 8),
    ("dualpipe", 16, 32),
    ("dualpipev", 2, 4),
    ("dualpipev", 4, 8),
]
BOTH = tuple(Direction)


@pytest.mark.parametrize(("schedule", "ranks", "micro_batches"), SCHEDULES)
def test_every_schedule_hangs_without_a_warm_up_and_ends_with_one(
    schedule: str, ranks: int, micro_batches: int
) -> None:
    program = build_program(schedule, ranks, micro_batches)
    fault = only(*program_logs(program, warm=()))
    assert fault.kind == "hang"
    assert "connects rank" in fault.text
    for rank in range(ranks):
        assert f"rank {rank}: host connects" in fault.text
    assert not list(find_hangs(program_logs(program, warm=BOTH)))


def test_two_ranks_in_a_loop_end_once_both_directions_are_connected() -> None:
    program = build_program("interleaved", 2, 4)
    assert "connects rank" in only(*program_logs(program, warm=())).text
    assert not list(find_hangs(program_logs(program, warm=BOTH)))


def shared_embedding(rank: int, index: int) -> Sequence[CollectiveRecord]:
    """First and last rank sum its gradient after their last backward, with 4 ranks and 8 micro-batches."""
    if rank not in (0, 3) or index != 15:
        return ()
    return (collective("sum of gradients", ranks=(0, 3), operation="reduce_scatter", group="dense", stream="reduce"),)


def test_a_reduce_scatter_before_the_own_sends_hangs() -> None:
    program = build_program("1f1b", 4, 8)
    behind = program_logs(program, warm=BOTH, listener=shared_embedding, sends_first=False)
    fault = only(*behind)
    assert set(fault.ranks) == {0, 1, 2, 3}
    wait = "rank 3, host connects `dense` of ranks 0, 3 for its first reduce_scatter"
    assert f"{wait}: blocked by rank 0, host" in fault.text
    assert not list(find_hangs(program_logs(program, warm=BOTH, listener=shared_embedding, sends_first=True)))


def test_the_same_ends_where_the_reduction_is_connected() -> None:
    program = build_program("1f1b", 4, 8)
    connected = [
        replace(each, events=(*shared_embedding(each.rank, 15), *each.events))
        for each in program_logs(program, warm=BOTH, listener=shared_embedding, sends_first=False)
    ]
    assert not list(find_hangs(connected))
