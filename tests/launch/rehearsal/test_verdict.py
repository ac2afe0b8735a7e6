"""The verdict: each limit of a step, what is counted, and how it is printed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from shoestring.launch.compose import compose_run
from shoestring.launch.rehearsal.log import Finding, HostWait, Launches, LogEvent, RankLog
from shoestring.launch.rehearsal.tables import verdict_lines, verdict_table, verdict_tree
from shoestring.launch.rehearsal.verdict import Verdict, judge

from .logs import GIB, MEMORY, batch, collective, log, message, swapped

CONFIG = compose_run(["experiment=quickstart"])
"""DualPipeV on two pipeline ranks; its model has a dense layer, three MoE layers and an MTP module."""

ATTENTION = "trainer/model/attention.py:forward"
MIDDLE = (
    Launches("attn(F)", "layer_01", "compute", "mm", ATTENTION, 32, 8000),
    Launches("attn(F)", "layer_02", "compute", "add", ATTENTION, 16, 16000),
    Launches("dispatch", "layer_02", "exchange", "index", "comm/exchange/permutation.py:spread", 6, 1200),
    Launches("attn(W)", "", "compute", "mm", "parallelism/weight_grad.py:run", 24, 2400),
    Launches("W", "", "compute", "mm", "parallelism/weight_grad.py:run", 8, 800),
    Launches("FB", "", "compute", "add", "trainer/model/chunk.py:forward", 4, 400),
    Launches("optimizer", "", "compute", "adamw", "trainer/optimizer/adamw.py:step", 10, 5000),
)
"""Of the second pipeline rank, which has two MoE layers and nothing else; the first has one, and the rest."""
ENDS = (
    Launches("attn(F)", "layer_03", "compute", "mm", ATTENTION, 24, 0),
    Launches("attn(W)", "", "compute", "mm", "parallelism/weight_grad.py:run", 100, 7000),
    Launches("dense(F)", "", "compute", "mm", ATTENTION, 400, 40000),
    Launches("attn(F)", "mtp_01", "compute", "mm", ATTENTION, 4, 4),
    Launches("optimizer", "", "compute", "adamw", "trainer/optimizer/adamw.py:step", 30, 9000),
)


def judged(*logs: RankLog) -> Verdict:
    return judge(CONFIG, logs)


def kinds(*logs: RankLog) -> list[str]:
    return [fault.kind for fault in judged(*logs).faults]


def waits(*events: LogEvent) -> RankLog:
    return log(0, *events)


def printed(verdict: Verdict, passes: int = 0) -> str:
    console = Console(width=110, markup=False)
    text, tables = verdict_table(verdict, passes)
    with console.capture() as capture:
        console.print(tables)
    return f"{text}\n{capture.get()}"


def tree(verdict: Verdict) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(json.dumps(verdict_tree(verdict)))
    return parsed


def test_nothing_found() -> None:
    lower = log(0, collective("dispatch"), batch([message("a", 1)], [message("b", 1)]))
    upper = log(1, collective("dispatch"), batch([message("b", 0)], [message("a", 0)]))
    verdict = judged(lower, upper)
    assert verdict.exit_code == 0
    assert verdict_lines(verdict) == [
        "no findings: 2 of 4 ranks, 4 micro-batches",
        "0 mismatches in 1 collectives and 2 messages that rehearsed ranks have in common",
        "assumed: routing is balanced",
    ]
    assert tree(verdict)["findings"] == []
    assert tree(verdict)["compared"] == {"collectives": 1, "messages": 2}


def test_the_verdict_comes_first_and_faults_that_end_a_run_before_others() -> None:
    slow = Finding("deprecated", "torch.x is deprecated", "FB: comm/x.py:3 f")
    broken = Finding("device", "add takes a tensor of the host", "F: trainer/y.py:4 g")
    rows = [collective("x"), collective("y"), collective("x"), collective("y")]
    verdict = judged(log(0, *rows, findings=[slow, broken]), swapped(log(1, *rows, findings=[slow]), 2, 3))
    assert [fault.kind for fault in verdict.faults] == ["device", "collective", "deprecated"]
    assert verdict.exit_code == 1
    first, *others = printed(verdict).splitlines()
    assert first == "3 findings: 2 of 4 ranks, 4 micro-batches"
    assert others[0].startswith("device, rank 0: add takes a tensor of the host [F: trainer/y.py:4 g]")
    assert [len(found["ranks"]) for found in tree(verdict)["findings"]] == [1, 2, 2]
    assert tree(verdict)["mismatches"] == verdict.mismatches == 1


def test_a_line_that_several_instructions_run_is_one_finding() -> None:
    each = [Finding("host read", "the host waits", f"instruction {number}: a.py:3 f") for number in range(5)]
    (fault,) = judged(log(0, findings=each), log(1, findings=each)).faults
    assert (fault.ranks, fault.places) == ((0, 1), ("instruction 0: a.py:3 f",))
    assert fault.text == "the host waits; 10 times"


def test_inside_a_pair_the_host_waits_for_events_alone() -> None:
    read = HostWait(None, "compute", "read", "FB: a.py:3 f", is_inside_pair=True)
    assert kinds(waits(read)) == ["host read"]
    assert not kinds(waits(replace(read, reason="event"), replace(read, is_inside_pair=False)))
    known = Finding("host read", "the host waits", read.place)
    assert kinds(log(0, read, findings=[known])) == ["host read"]
    (row,) = judged(waits(read, read)).host_reads
    assert (row.line, row.reason, row.is_inside_pair, row.times, row.most) == ("a.py:3 f", "read", True, 2, 2)


def test_no_collective_of_the_host_in_a_step() -> None:
    control = collective("halt", group="control", operation="all_reduce")
    assert kinds(waits(control)) == ["control"]
    assert not kinds(waits(replace(control, is_warm_up=True)))


def test_at_most_two_collectives_over_all_ranks() -> None:
    world = [collective(name, group="world", operation="all_reduce") for name in ("counts", "norm", "halt")]
    assert not kinds(waits(*world[:2], replace(world[2], is_warm_up=True)))
    (fault,) = judged(waits(*world)).faults
    assert fault.kind == "world"
    assert "all_reduce (counts), all_reduce (norm), all_reduce (halt)" in fault.text
    assert fault.places == (world[2].place,)


def test_process_groups_are_few() -> None:
    assert not kinds(replace(log(0), group_creations=20))
    assert kinds(replace(log(0), group_creations=21)) == ["groups"]


@pytest.mark.parametrize("peak", [0.94, 1.06])
def test_the_peak_is_within_five_percent_of_the_prediction(peak: float) -> None:
    memory = replace(MEMORY, peak=int(peak * MEMORY.predicted), capacity=None)
    (fault,) = judged(replace(log(0), memory=memory)).faults
    assert fault.kind == "memory"
    assert f"{peak - 1:+.1%}; 5% is allowed" in fault.text
    assert not kinds(replace(log(0), memory=replace(memory, peak=int(1.04 * MEMORY.predicted))))


def test_what_does_not_fit_is_found_once() -> None:
    full = replace(MEMORY, capacity=70.0 * GIB - 1)
    assert kinds(replace(log(0), memory=full)) == ["memory"]
    own = Finding("memory", "does not fit", "mlp(B)")
    assert kinds(replace(log(0, findings=[own]), memory=full)) == ["memory"]
    assert kinds(replace(log(0), memory=replace(MEMORY, building=77 * GIB))) == ["memory"]


def test_behind_an_error_only_the_error_is_told() -> None:
    cut = replace(log(1, findings=[Finding("error", "shapes", "F: a.py:1 f")]), memory=replace(MEMORY, peak=0))
    verdict = judged(log(0, collective("x")), cut)
    assert [fault.kind for fault in verdict.faults] == ["error"]
    assert "connection model: not run, for the step of rank 1 ends by its error" in verdict_lines(verdict)
    assert tree(verdict)["connection_model"] == "not run"


def test_launches_are_those_of_one_layer_and_micro_batch() -> None:
    """Four micro-batches and three MoE layers: 12 times a phase. Weight gradients, without a layer, are two's."""
    verdict = judged(replace(log(0), launches=ENDS), replace(log(1), launches=MIDDLE))
    counts = {(each.of, each.phase): (each.launches, each.bytes) for each in verdict.phases}
    assert counts == {
        ("MoE layer", "attn(F)"): (72 / 12, 2000.0),
        ("MoE layer", "dispatch"): (0.5, 100.0),
        ("MoE layer", "attn(W)"): (3.0, 300.0),
        ("MoE layer", "W"): (1.0, 100.0),
        ("MoE layer", "FB"): (0.5, 50.0),
        ("dense layer", "dense(F)"): (100.0, 10000.0),
        ("MTP module", "attn(F)"): (1.0, 1.0),
        ("step", "attn(W)"): (50.0, 3500.0),
        ("step", "optimizer"): (20.0, 7000.0),
    }
    assert verdict.layer_pair == {"compute": (10.5, 2450.0), "exchange": (0.5, 100.0)}
    moved = [(each.operation, each.phase) for each in verdict.passes if each.of == "MoE layer"]
    assert moved[:3] == [("add", "attn(F)"), ("mm", "attn(F)"), ("mm", "attn(W)")]


def test_in_a_bidirectional_program_a_layer_sees_half_of_the_micro_batches() -> None:
    both = compose_run(["experiment=quickstart", "schedule=dualpipe"])
    (count,) = judge(both, [replace(log(1), launches=MIDDLE[2:3])]).phases
    assert (count.launches, count.bytes) == (6 / 2 / 3, 1200 / 2 / 3)


def test_the_tables_say_what_the_tree_says() -> None:
    read = HostWait(None, "compute", "read", "F: comm/exchange/two_hop.py:9 sizes")
    verdict = judged(replace(log(0, read, collective("x"), batch([message("a", 3)])), launches=ENDS[:1] + MIDDLE[2:3]))
    (rank,) = tree(verdict)["ranks"]
    assert (rank["collectives"], rank["batches"], rank["host_waits"], rank["group_creations"]) == (1, 1, 1, 14)
    assert rank["peak_above_prediction"] == pytest.approx(70 / 71 - 1)
    text = printed(verdict, passes=1)
    assert "75.16 │ mlp(B) │     76.24 │      -1.4% │       81.60 │" in text
    assert "│ comm/exchange/two_hop.py:9 sizes │ read │ no" in text
    assert "│ MoE layer pair │ without weight gradients │ exchange │      1.5 │" in text
    assert "│ MoE layer pair │ without weight gradients │ all      │      7.5 │" in text
    assert not tree(verdict)["layer_pair_has_weight_gradients"]
    whole = judged(replace(log(0), launches=ENDS), replace(log(1), launches=MIDDLE))
    assert "│ MoE layer pair │ forward and backward │ exchange │" in printed(whole, passes=0)
    assert "comm/exchange/permutation.py:spread" in text
    assert "attention.py" not in text
    assert "comm/exchange/permutation.py:spread" not in printed(verdict)
