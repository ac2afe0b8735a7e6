"""Launches and bytes per layer and micro-batch."""

from dataclasses import replace

from shoestring.launch.compose import compose_run_config
from shoestring.launch.rehearsal.launch_counts import moe_layer_totals
from shoestring.launch.rehearsal.result import RehearsalResult
from shoestring.tests.launch.rehearsal.judged import ENDS, MIDDLE, judged
from shoestring.tests.launch.rehearsal.logs import log


def test_launches_are_those_of_one_layer_and_micro_batch() -> None:
    """Four micro-batches of three MoE layers: a phase runs 12 times. Weight gradients have no layer and run 8 times."""
    result = judged(replace(log(0), launches=ENDS), replace(log(1), launches=MIDDLE))
    counts = {(each.owner, each.phase): (each.launches, each.bytes) for each in result.launches_by_phase}
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
    assert moe_layer_totals(result.launches_by_phase) == {"compute": (10.5, 2450.0), "exchange": (0.5, 100.0)}
    moved = [(each.operation, each.phase) for each in result.launches_by_operation if each.owner == "MoE layer"]
    assert moved[:3] == [("add", "attn(F)"), ("mm", "attn(F)"), ("mm", "attn(W)")]


def test_in_a_bidirectional_program_a_layer_sees_half_of_the_micro_batches() -> None:
    both = compose_run_config(["experiment=quickstart", "schedule=dualpipe"])
    (count,) = RehearsalResult(both, (replace(log(1), launches=MIDDLE[2:3]),)).launches_by_phase
    assert (count.launches, count.bytes) == (6 / 2 / 3, 1200 / 2 / 3)
