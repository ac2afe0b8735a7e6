"""The connection model: what hangs on NCCL hangs here, by hand-made logs and by those of every schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from shoestring.launch.rehearsal.deadlock.stuck import hangs
from shoestring.launch.rehearsal.fault import Fault
from shoestring.launch.rehearsal.log import Collective, Finding, HostWait, RankLog, Record, StreamWait
from shoestring.parallelism.pipeline.placement import Direction
from shoestring.parallelism.pipeline.schedules.registry import build_program

from ..logs import batch, collective, log, message, program_logs

SCHEDULES = [
    ("gpipe", 4, 8),
    ("one_f_one_b", 2, 4),
    ("one_f_one_b", 4, 8),
    ("interleaved", 4, 8),
    ("zb1p", 4, 8),
    ("dualpipe", 2, 4),
    ("dualpipe", 4, 8),
    ("dualpipe", 16, 32),
    ("dualpipev", 2, 4),
    ("dualpipev", 4, 8),
]

BOTH = tuple(Direction)
A = message("a", 1)
FROM_0 = message("a", 0)


def only(*logs: RankLog) -> Fault:
    (fault,) = hangs(logs)
    return fault


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
    assert not list(hangs(program_logs(program, warm=BOTH)))


def test_two_ranks_in_a_loop_end_once_both_directions_are_connected() -> None:
    program = build_program("interleaved", 2, 4)
    assert "connects rank" in only(*program_logs(program, warm=())).text
    assert not list(hangs(program_logs(program, warm=BOTH)))


def test_a_receive_that_meets_both_directions() -> None:
    both = batch([FROM_0], [FROM_0])
    fault = only(log(0, batch([], [A]), batch([A])), log(1, both))
    assert (fault.kind, fault.ranks) == ("first contact", (0, 1))
    assert "rank 0 receives only; the first batch of rank 1 sends and receives" in fault.text
    assert not list(hangs([log(0, batch([A], [A])), log(1, both)]))
    wide = tuple(range(4))  # next is not previous among four
    assert not list(hangs([log(0, batch([A], [A], ranks=wide)), log(1, replace(both, ranks=wide))]))


def shared_embedding(rank: int, index: int) -> Sequence[Collective]:
    """First and last rank sum its gradient behind their last backward; of 4 ranks and 8 micro-batches."""
    if rank not in (0, 3) or index != 15:
        return ()
    return (collective("sum of gradients", ranks=(0, 3), operation="reduce_scatter", group="dense", stream="reduce"),)


def test_a_reduce_scatter_before_the_own_sends_hangs() -> None:
    program = build_program("one_f_one_b", 4, 8)
    behind = program_logs(program, warm=BOTH, listener=shared_embedding, sends_first=False)
    fault = only(*behind)
    assert set(fault.ranks) == {0, 1, 2, 3}
    assert "rank 3, host connects `dense` of ranks 0, 3 for its first reduce_scatter: for rank 0, host" in fault.text
    assert not list(hangs(program_logs(program, warm=BOTH, listener=shared_embedding, sends_first=True)))


def test_the_same_ends_where_the_reduction_is_connected() -> None:
    program = build_program("one_f_one_b", 4, 8)
    connected = [
        replace(each, events=(*shared_embedding(each.rank, 15), *each.events))
        for each in program_logs(program, warm=BOTH, listener=shared_embedding, sends_first=False)
    ]
    assert not list(hangs(connected))


def test_operations_of_a_communicator_connect_each_on_their_own() -> None:
    gather, scatter = collective("g", operation="all_gather"), collective("s", operation="reduce_scatter")
    warm = replace(gather, is_warm_up=True)
    cross = [log(0, warm, batch([], [A], stream="x"), scatter), log(1, warm, scatter, batch([FROM_0], stream="x"))]
    assert only(*cross).kind == "hang"
    known = [replace(each, events=(scatter, *each.events)) for each in cross]
    assert "reduce_scatter" in only(*known[:1], log(1, warm)).text
    pairs = batch([A], [A]), batch([FROM_0], [FROM_0])
    connected = [replace(each, events=(own, *each.events)) for each, own in zip(known, pairs, strict=True)]
    assert not list(hangs(connected))


def test_a_cycle_over_two_communicators() -> None:
    first, second = collective("x", group="ep"), collective("y", group="dense", stream="exchange")
    warm = (first, second)
    fault = only(log(0, *warm, first, second), log(1, *warm, second, first))
    assert fault.kind == "hang"
    assert "rank 0, stream exchange is in number 2 on `ep` of ranks 0, 1 (x): for rank 1, stream exchange" in fault.text
    assert "rank 1, stream exchange is in number 2 on `dense` of ranks 0, 1 (y): for rank 0" in fault.text
    apart = replace(second, stream="reduce")
    assert not list(hangs([log(0, *warm, first, apart), log(1, *warm, apart, first)]))


def test_one_communicator_keeps_its_order_over_streams() -> None:
    """The second all-to-all has a stream of its own, and waits all the same for the first."""
    first, second, other = collective("x"), collective("y", stream="other"), collective("z", group="dense")
    wait, late = HostWait(None, "other", "read", "h"), replace(other, stream="reduce")
    fault = only(log(0, first, other, other, first, second), log(1, first, late, first, second, wait, late))
    assert "rank 1, stream other waits for an earlier operation on `ep` of ranks 0, 1: for rank 1" in fault.text
    apart = replace(second, group="another")
    assert not list(hangs([log(0, first, other, other, first, apart), log(1, first, late, first, apart, wait, late)]))


def test_messages_both_ways_need_one_batch() -> None:
    """Each rank of a loop sends to the next: a batch of sends ends only when its receives are open."""
    warm = (batch([A], [A]), batch([FROM_0], [FROM_0]))
    assert not list(hangs([log(0, warm[0], warm[0]), log(1, warm[1], warm[1])]))
    apart = [log(0, warm[0], batch([A]), batch([], [A])), log(1, warm[1], batch([FROM_0]), batch([], [FROM_0]))]
    fault = only(*apart)
    assert "rank 0, stream edge up sends to rank 1 on `pipeline up` of ranks 0, 1 (a)" in fault.text


def test_a_host_that_waits_for_a_stream_that_needs_it() -> None:
    """Rank 0 reads what the exchange brings before it makes the call that rank 1 is in."""
    warm = (collective("w"), collective("w", group="dense", stream="reduce"))
    first, second = collective("x"), collective("y", group="dense", stream="reduce")
    wait = HostWait(None, "exchange", "read", "route.py:7")
    fault = only(
        log(0, *warm, first, wait, second), log(1, *warm, second, HostWait(None, "reduce", "read", "b"), first)
    )
    assert fault.places == ("route.py:7", "b")
    assert "waits (read) for stream exchange" in fault.text
    assert not list(hangs([log(0, *warm, first, second, wait), log(1, *warm, second, first)]))


def test_an_event_holds_a_stream_until_it_is_complete() -> None:
    warm = (collective("w"), collective("w", group="dense", stream="reduce"))
    first, second = collective("x"), collective("y", group="dense", stream="reduce")
    held = (first, Record(1, "exchange"), StreamWait(1, "reduce"), second)
    assert only(log(0, *warm, *held), log(1, *warm, second, HostWait(None, "reduce", "event", "b"), first))
    assert not list(hangs([log(0, *warm, *held), log(1, *warm, *held)]))


def test_a_call_that_a_rank_never_makes_is_the_root() -> None:
    first = collective("x")
    fault = only(log(0, first, first, HostWait(None, "exchange", "synchronize", "end")), log(1, first))
    assert "rank 1, host has ended without it" in fault.text
    assert "rank 0: host waits (synchronize) for stream exchange at end; stream exchange is in number 2" in fault.text


def test_a_host_is_in_a_collective_of_the_control_group() -> None:
    control, first = collective("halt", group="control", operation="all_reduce", stream="host"), collective("x")
    assert not list(hangs([log(0, control, first), log(1, control, first)]))
    fault = only(log(0, first, control, first), log(1, first, first, HostWait(None, "exchange", "read", "b"), control))
    assert "waits (a collective of the host) for stream control" in fault.text


def test_ranks_that_were_not_rehearsed_do_their_part() -> None:
    assert not list(hangs([log(0, collective("x"), batch([], [A]), HostWait(None, "edge up", "read", "h"))]))


def test_nothing_is_said_behind_an_error() -> None:
    error = Finding("error", "out of memory", "line 3")
    assert not list(hangs([log(0, collective("x"), findings=[error]), log(1)]))
