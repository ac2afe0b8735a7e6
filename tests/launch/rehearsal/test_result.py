"""The result of a rehearsal: each limit of a step, the counts, and the printed form."""

from dataclasses import replace

from shoestring.launch.rehearsal.answer import rehearsal_answer
from shoestring.launch.rehearsal.log import HostWait, RankFinding
from shoestring.tests.launch.rehearsal.judged import judged, printed, tree
from shoestring.tests.launch.rehearsal.logs import MEMORY, batch, collective, log, message, swapped


def test_nothing_found() -> None:
    lower = log(0, collective("dispatch"), batch([message("a", 1)], [message("b", 1)]))
    upper = log(1, collective("dispatch"), batch([message("b", 0)], [message("a", 0)]))
    result = judged(lower, upper)
    assert rehearsal_answer(result, 0).exit_code == 0
    assert printed(result).splitlines()[:3] == [
        "no findings: 2 of 4 ranks, 4 micro-batches",
        "0 mismatches in 1 collectives and 2 messages between rehearsed ranks",
        "assumed: routing is balanced",
    ]
    assert tree(result)["findings"] == []
    assert tree(result)["compared_counts"] == {"collectives": 1, "p2p_ops": 2}


def test_the_result_comes_first_and_faults_that_end_a_run_before_others() -> None:
    slow = RankFinding("deprecated", "torch.x is deprecated", "FB: comm/x.py:3 f")
    broken = RankFinding("device", "add takes a host tensor", "F: trainer/y.py:4 g")
    rows = [collective("x"), collective("y"), collective("x"), collective("y")]
    result = judged(log(0, *rows, findings=[slow, broken]), swapped(log(1, *rows, findings=[slow]), 2, 3))
    assert [fault.kind for fault in result.findings] == ["device", "collective", "deprecated"]
    assert rehearsal_answer(result, 0).exit_code == 1
    first, *others = printed(result).splitlines()
    assert first == "3 findings: 2 of 4 ranks, 4 micro-batches"
    assert others[0].startswith("device, rank 0: add takes a host tensor [F: trainer/y.py:4 g]")
    assert [len(found["ranks"]) for found in tree(result)["findings"]] == [1, 2, 2]
    assert tree(result)["mismatches"] == result.mismatch_count == 1


def test_after_an_error_only_the_error_is_reported() -> None:
    cut = replace(
        log(1, findings=[RankFinding("error", "shapes", "F: a.py:1 f")]), memory=replace(MEMORY, peak_bytes=0)
    )
    result = judged(log(0, collective("x")), cut)
    assert [fault.kind for fault in result.findings] == ["error"]
    assert "deadlock check: not run, because the step of rank 1 failed" in printed(result).splitlines()
    assert tree(result)["deadlock_check"] == "not run"


def test_host_waits_are_counted_by_code_line() -> None:
    read = HostWait(None, "compute", "read", "FB: a.py:3 f", is_inside_fb=True)
    (row,) = judged(log(0, read, read)).host_wait_summaries
    assert (row.code_line, row.reason, row.is_inside_fb) == ("a.py:3 f", "read", True)
    assert (row.count, row.max_per_rank) == (2, 2)
