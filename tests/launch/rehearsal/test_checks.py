"""Limits of a step on one rank, and of its memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoestring.launch.rehearsal.log import HostWait, LogEvent, RankFinding, RankLog
from shoestring.tests.launch.rehearsal.judged import judged
from shoestring.tests.launch.rehearsal.logs import GIB, MEMORY, collective, log


def kinds(*logs: RankLog) -> list[str]:
    return [fault.kind for fault in judged(*logs).findings]


def waits(*events: LogEvent) -> RankLog:
    return log(0, *events)


def test_inside_a_pair_the_host_waits_for_events_alone() -> None:
    read = HostWait(None, "compute", "read", "FB: a.py:3 f", is_inside_fb=True)
    assert kinds(waits(read)) == ["host read"]
    assert not kinds(waits(replace(read, reason="event"), replace(read, is_inside_fb=False)))
    known = RankFinding("host read", "the host waits", read.code_location)
    assert kinds(log(0, read, findings=[known])) == ["host read"]
    (row,) = judged(waits(read, read)).host_wait_summaries
    assert (row.code_line, row.reason, row.is_inside_fb, row.count, row.max_per_rank) == (
        "a.py:3 f",
        "read",
        True,
        2,
        2,
    )


def test_no_collective_of_the_host_in_a_step() -> None:
    control = collective("halt", group="control", operation="all_reduce")
    assert kinds(waits(control)) == ["control"]
    assert not kinds(waits(replace(control, is_warm_up=True)))


def test_at_most_two_collectives_over_all_ranks() -> None:
    world = [collective(name, group="world", operation="all_reduce") for name in ("counts", "norm", "halt")]
    assert not kinds(waits(*world[:2], replace(world[2], is_warm_up=True)))
    (fault,) = judged(waits(*world)).findings
    assert fault.kind == "world"
    assert "all_reduce (counts), all_reduce (norm), all_reduce (halt)" in fault.text
    assert fault.code_locations == (world[2].code_location,)


def test_process_groups_are_few() -> None:
    assert not kinds(replace(log(0), group_creations=20))
    assert kinds(replace(log(0), group_creations=21)) == ["groups"]


@pytest.mark.parametrize("peak", [0.94, 1.06])
def test_the_peak_is_within_five_percent_of_the_prediction(peak: float) -> None:
    memory = replace(MEMORY, peak_bytes=int(peak * MEMORY.predicted_peak_bytes), capacity_bytes=None)
    (fault,) = judged(replace(log(0), memory=memory)).findings
    assert fault.kind == "memory"
    assert f"{peak - 1:+.1%}, limit 5%" in fault.text
    assert not kinds(replace(log(0), memory=replace(memory, peak_bytes=int(1.04 * MEMORY.predicted_peak_bytes))))


def test_what_does_not_fit_is_found_once() -> None:
    full = replace(MEMORY, capacity_bytes=70.0 * GIB - 1)
    assert kinds(replace(log(0), memory=full)) == ["memory"]
    own = RankFinding("memory", "does not fit", "mlp(B)")
    assert kinds(replace(log(0, findings=[own]), memory=full)) == ["memory"]
    assert kinds(replace(log(0), memory=replace(MEMORY, peak_while_building_bytes=77 * GIB))) == ["memory"]
