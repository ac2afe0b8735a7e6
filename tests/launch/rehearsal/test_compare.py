"""Two rehearsed ranks compared: no finding where they agree, and each kind of mismatch is named."""

from dataclasses import replace

from shoestring.launch.rehearsal.compare import compare_rank_logs
from shoestring.launch.rehearsal.findings import RunFinding
from shoestring.launch.rehearsal.log import P2PBatchRecord, RankFinding, RankLog

from .logs import batch, collective, log, message, swapped, without

DISPATCH = [collective(f"dispatch of layer_0{layer}, micro-batch 0") for layer in range(4)]


def only(*logs: RankLog) -> RunFinding:
    (fault,) = compare_rank_logs(logs)
    return fault


def pair() -> tuple[RankLog, RankLog]:
    """Return two neighbors with two messages to the next rank and one back."""
    up = [message("activation 0", 1), message("activation 1", 1)]
    down = message("gradient 0", 1)
    lower = log(0, batch([up[0]]), batch([up[1]]), batch([], [down], group="pp prev", stream="p2p prev"))
    arriving = [replace(each, peer=0) for each in up]
    upper = log(
        1,
        batch([], arriving),
        batch([replace(down, peer=0)], group="pp prev", stream="p2p prev"),
    )
    return lower, upper


def test_equal_logs_have_no_fault() -> None:
    assert not list(compare_rank_logs([log(rank, *DISPATCH) for rank in (0, 1)]))
    assert not list(compare_rank_logs(pair()))


def test_ranks_that_share_no_communicator_are_not_compared() -> None:
    others = [replace(each, ranks=(2, 3)) for each in DISPATCH[:1]]
    assert not list(compare_rank_logs([log(0, *DISPATCH), log(2, *others)]))


def test_two_collectives_in_each_others_place() -> None:
    fault = only(log(0, *DISPATCH), swapped(log(1, *DISPATCH), 1, 2))
    assert (fault.kind, fault.ranks) == ("collective", (0, 1))
    assert "number 2 on `ep` of ranks 0, 1" in fault.text
    assert "rank 0 has all_to_all (dispatch of layer_01, micro-batch 0)" in fault.text
    assert "rank 1 has all_to_all (dispatch of layer_02, micro-batch 0)" in fault.text
    assert "1 more after it" in fault.text
    assert fault.code_locations == (DISPATCH[1].code_location, DISPATCH[2].code_location)


def test_operation_shape_and_dtype_count() -> None:
    (first,) = DISPATCH[:1]
    for changed in (
        replace(first, operation="all_gather"),
        replace(first, shape=(64,)),
        replace(first, dtype="float32"),
    ):
        assert only(log(0, first), log(1, changed)).kind == "collective"


def test_a_collective_that_one_rank_leaves_out() -> None:
    fault = only(log(0, *DISPATCH), without(log(1, *DISPATCH), 3))
    assert "number 4" in fault.text
    assert "rank 1 has none (its last is number 3)" in fault.text
    assert fault.code_locations == (DISPATCH[3].code_location,)


def test_a_member_with_no_collective_at_all() -> None:
    assert "rank 1 has none (its last is number 0)" in only(log(0, *DISPATCH), log(1)).text


def test_the_odd_one_of_three_is_named_with_its_neighbors() -> None:
    rows = [replace(each, ranks=(0, 1, 2), sends=(8,) * 3, receives=(8,) * 3) for each in DISPATCH]
    faults = list(compare_rank_logs([log(0, *rows), swapped(log(1, *rows), 0, 1), log(2, *rows)]))
    assert [fault.ranks for fault in faults] == [(0, 1), (1, 2)]


def test_rows_sent_are_rows_expected_for_every_pair() -> None:
    def exchange(sends: tuple[int, ...], receives: tuple[int, ...]) -> RankLog:
        rank = next(number for number in range(3) if sends[number] == receives[number] == 0)
        return log(rank, collective("dispatch", ranks=(0, 1, 2), sends=sends, receives=receives))

    logs = [exchange((0, 4, 5), (0, 2, 3)), exchange((2, 0, 7), (4, 0, 6)), exchange((3, 6, 0), (5, 7, 0))]
    assert not list(compare_rank_logs(logs))
    fault = only(logs[0], logs[1], exchange((2, 6, 0), (5, 7, 0)))
    assert fault.ranks == (0, 2)
    rows = "rank 0 sends 5 rows to rank 2, which expects 5; rank 2 sends 2 rows to rank 0, which expects 3"
    assert rows in fault.text


def test_a_shape_that_differs_between_neighbors() -> None:
    lower, upper = pair()
    first, *others = upper.events
    assert isinstance(first, P2PBatchRecord)
    wrong = [replace(each, shape=(2, 128, 64)) for each in first.receives]
    fault = only(lower, replace(upper, events=(batch([], wrong), *others)))
    assert (fault.kind, fault.ranks) == ("message", (0, 1))
    assert "message 1 from rank 0 to rank 1 on `pp next` of ranks 0, 1" in fault.text
    assert "rank 0 sends activation 0, bfloat16 [1, 128, 64]; rank 1 receives activation 0, bfloat16 [2" in fault.text
    assert fault.code_locations == ("activation 0 in line 9", "activation 0; activation 1 in line 9")


def test_a_receive_without_a_send() -> None:
    lower, upper = pair()
    fault = only(without(lower, 1), upper)
    assert "message 2 from rank 0 to rank 1" in fault.text
    assert "rank 0 sends none; rank 1 receives activation 1" in fault.text
    assert fault.code_locations == ("activation 0; activation 1 in line 9",)


def test_messages_of_another_communicator_do_not_match() -> None:
    sent, received = log(0, batch([message("a", 1)])), log(1, batch([], [message("a", 0)], group="pp prev"))
    assert len(list(compare_rank_logs([sent, received]))) == 2


def test_messages_to_ranks_that_were_not_rehearsed_are_not_compared() -> None:
    assert not list(compare_rank_logs([log(0, batch([message("a", 1)]))]))


def test_a_log_that_ends_by_an_error_is_compared_as_far_as_it_goes() -> None:
    error = RankFinding("error", "a product of float32 and bfloat16", "line 3")
    cut = replace(without(log(1, *DISPATCH), 2, 3), findings=(error,))
    assert not list(compare_rank_logs([log(0, *DISPATCH), cut]))
    assert len(list(compare_rank_logs([log(0, *DISPATCH), swapped(cut, 0, 1)]))) == 1
    lower, upper = pair()
    assert not list(compare_rank_logs([replace(without(lower, 1, 2), findings=(error,)), without(upper, 1)]))
    assert len(list(compare_rank_logs([without(lower, 1, 2), replace(without(upper, 1), findings=(error,))]))) == 1
