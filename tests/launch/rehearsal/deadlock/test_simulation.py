"""The deadlock check: what hangs on NCCL hangs here, with hand-made logs and those of every schedule."""

from dataclasses import replace

from shoestring.launch.rehearsal.deadlock.diagnosis import find_hangs
from shoestring.launch.rehearsal.log import EventRecord, HostWait, StreamWait
from shoestring.tests.launch.rehearsal.deadlock.hanging import only
from shoestring.tests.launch.rehearsal.logs import batch, collective, log, message

A = message("a", 1)
FROM_0 = message("a", 0)


def test_a_receive_that_meets_both_directions() -> None:
    both = batch([FROM_0], [FROM_0])
    fault = only(log(0, batch([], [A]), batch([A])), log(1, both))
    assert (fault.kind, fault.ranks) == ("first contact", (0, 1))
    assert "rank 0 receives only; the first batch of rank 1 sends and receives" in fault.text
    assert not list(find_hangs([log(0, batch([A], [A])), log(1, both)]))
    wide = tuple(range(4))  # among four ranks next and previous differ
    assert not list(find_hangs([log(0, batch([A], [A], ranks=wide)), log(1, replace(both, ranks=wide))]))


def test_operations_of_a_communicator_connect_separately() -> None:
    gather, scatter = collective("g", operation="all_gather"), collective("s", operation="reduce_scatter")
    warm = replace(gather, is_warm_up=True)
    cross = [log(0, warm, batch([], [A], stream="x"), scatter), log(1, warm, scatter, batch([FROM_0], stream="x"))]
    assert only(*cross).kind == "hang"
    known = [replace(each, events=(scatter, *each.events)) for each in cross]
    assert "reduce_scatter" in only(*known[:1], log(1, warm)).text
    pairs = batch([A], [A]), batch([FROM_0], [FROM_0])
    connected = [replace(each, events=(own, *each.events)) for each, own in zip(known, pairs, strict=True)]
    assert not list(find_hangs(connected))


def test_one_communicator_keeps_its_order_over_streams() -> None:
    """The second all-to-all has another stream, and still waits for the first."""
    first, second, other = collective("x"), collective("y", stream="other"), collective("z", group="dense")
    wait, late = HostWait(None, "other", "read", "h"), replace(other, stream="reduce")
    fault = only(log(0, first, other, other, first, second), log(1, first, late, first, second, wait, late))
    assert "rank 1, stream other waits for an earlier operation on `ep` of ranks 0, 1: blocked by rank 1" in fault.text
    apart = replace(second, group="another")
    assert not list(
        find_hangs([log(0, first, other, other, first, apart), log(1, first, late, first, apart, wait, late)])
    )


def test_messages_both_ways_need_one_batch() -> None:
    """Each rank of a ring sends to the next: a batch of sends ends only when its receives are posted."""
    warm = (batch([A], [A]), batch([FROM_0], [FROM_0]))
    assert not list(find_hangs([log(0, warm[0], warm[0]), log(1, warm[1], warm[1])]))
    apart = [log(0, warm[0], batch([A]), batch([], [A])), log(1, warm[1], batch([FROM_0]), batch([], [FROM_0]))]
    fault = only(*apart)
    assert "rank 0, stream p2p next sends to rank 1 on `pp next` of ranks 0, 1 (a)" in fault.text


def test_an_event_holds_a_stream_until_it_is_complete() -> None:
    warm = (collective("w"), collective("w", group="dense", stream="reduce"))
    first, second = collective("x"), collective("y", group="dense", stream="reduce")
    held = (first, EventRecord(1, "exchange"), StreamWait(1, "reduce"), second)
    assert only(log(0, *warm, *held), log(1, *warm, second, HostWait(None, "reduce", "event", "b"), first))
    assert not list(find_hangs([log(0, *warm, *held), log(1, *warm, *held)]))


def test_a_host_is_in_a_collective_of_the_control_group() -> None:
    control, first = collective("halt", group="control", operation="all_reduce", stream="host"), collective("x")
    assert not list(find_hangs([log(0, control, first), log(1, control, first)]))
    fault = only(log(0, first, control, first), log(1, first, first, HostWait(None, "exchange", "read", "b"), control))
    assert "waits (a collective of the host) for stream control" in fault.text


def test_ranks_that_were_not_rehearsed_do_their_part() -> None:
    assert not list(find_hangs([log(0, collective("x"), batch([], [A]), HostWait(None, "p2p next", "read", "h"))]))
