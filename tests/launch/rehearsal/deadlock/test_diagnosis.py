"""The reason for a deadlock in the simulation: the missing call, or the cycle."""

from dataclasses import replace

from shoestring.launch.rehearsal.deadlock.diagnosis import find_hangs
from shoestring.launch.rehearsal.log import HostWait, RankFinding
from shoestring.tests.launch.rehearsal.deadlock.hanging import only
from shoestring.tests.launch.rehearsal.logs import collective, log


def test_a_cycle_over_two_communicators() -> None:
    first, second = collective("x", group="ep"), collective("y", group="dense", stream="exchange")
    warm = (first, second)
    fault = only(log(0, *warm, first, second), log(1, *warm, second, first))
    assert fault.kind == "hang"
    wait = "rank 0, stream exchange is in number 2 on `ep` of ranks 0, 1 (x)"
    assert f"{wait}: blocked by rank 1, stream exchange" in fault.text
    assert "rank 1, stream exchange is in number 2 on `dense` of ranks 0, 1 (y): blocked by rank 0" in fault.text
    apart = replace(second, stream="reduce")
    assert not list(find_hangs([log(0, *warm, first, apart), log(1, *warm, apart, first)]))


def test_a_host_that_waits_for_a_stream_that_needs_it() -> None:
    """Rank 0 reads the result of the exchange before it makes the call that rank 1 is in."""
    warm = (collective("w"), collective("w", group="dense", stream="reduce"))
    first, second = collective("x"), collective("y", group="dense", stream="reduce")
    wait = HostWait(None, "exchange", "read", "route.py:7")
    fault = only(
        log(0, *warm, first, wait, second), log(1, *warm, second, HostWait(None, "reduce", "read", "b"), first)
    )
    assert fault.code_locations == ("route.py:7", "b")
    assert "waits (read) for stream exchange" in fault.text
    assert not list(find_hangs([log(0, *warm, first, second, wait), log(1, *warm, second, first)]))


def test_a_call_that_a_rank_never_makes_is_the_root() -> None:
    first = collective("x")
    fault = only(log(0, first, first, HostWait(None, "exchange", "synchronize", "end")), log(1, first))
    assert "rank 1, host has ended without that call" in fault.text
    assert "rank 0: host waits (synchronize) for stream exchange at end; stream exchange is in number 2" in fault.text


def test_nothing_is_reported_after_an_error() -> None:
    error = RankFinding("error", "out of memory", "line 3")
    assert not list(find_hangs([log(0, collective("x"), findings=[error]), log(1)]))
