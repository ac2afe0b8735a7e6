"""Limits of a step on one rank, and of its memory."""

from dataclasses import replace

import pytest

from shoestring.launch.rehearsal.log import LogEvent, RankFinding, RankLog
from shoestring.tests.launch.rehearsal.judged import judged
from shoestring.tests.launch.rehearsal.logs import GIB, MEMORY, collective, log


def kinds(*logs: RankLog) -> list[str]:
    return [fault.kind for fault in judged(*logs).findings]


def waits(*events: LogEvent) -> RankLog:
    return log(0, *events)


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
    raised = RankFinding("error", "out of range", "mlp(B)")
    assert kinds(replace(log(0, findings=[raised]), memory=full)) == ["error", "memory"]
    (fault,) = judged(replace(log(0), memory=replace(MEMORY, peak_while_building_bytes=77 * GIB))).findings
    assert fault.text == "live tensors need 82.7 GB in building, the GPU has 81.6 GB for tensors"
    assert (fault.kind, fault.code_locations) == ("memory", ("building",))
