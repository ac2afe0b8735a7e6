"""Memory by replay: what is alive, and figures that others have counted."""

from __future__ import annotations

import pytest

from shoestring.launch.planner.lanes import StageShape
from shoestring.launch.planner.memory import activation_bytes, occupancy, stage_parameters
from shoestring.launch.planner.operations import Shape
from shoestring.launch.planner.recipe import NOTHING, REPORT, Precision, Recipe
from shoestring.parallelism.pipeline.program import in_flight
from shoestring.parallelism.pipeline.schedules import build_program
from shoestring.trainer.costs.parameters import count_parameters

from .v3 import simulated

MIB = 2**20


@pytest.mark.parametrize("schedule", ["gpipe", "one_f_one_b", "interleaved", "zb1p", "dualpipe", "dualpipev"])
def test_the_peak_is_that_of_the_program(schedule: str) -> None:
    program = build_program(schedule, 4, 12)
    peaks = [max(alive) for alive in in_flight(program)]
    assert [max(sum(moment[0]) for moment in occupancy(row)) for row in program.instructions] == peaks


def test_a_routed_layer_keeps_what_others_count() -> None:
    """Megatron-MoE-ModelZoo's tool: 2,236 MiB without savings, 1,020 with, in BF16; FP8 storage about 0.62 GB."""
    shape = Shape(simulated().config.model, 4096, 1, 64)
    bf16 = {how: Recipe(precision=Precision.BF16, recompute=how) for how in (NOTHING, REPORT)}
    assert activation_bytes(shape, bf16[NOTHING], routed=True) / MIB == pytest.approx(2236, rel=0.01)
    assert activation_bytes(shape, bf16[REPORT], routed=True) / MIB == pytest.approx(1020, rel=0.03)
    assert activation_bytes(shape, Recipe(), routed=True) == pytest.approx(0.62e9, rel=0.05)


def test_parameters_of_all_stages_are_the_models() -> None:
    model = simulated().config.model
    count = count_parameters(model)
    first = StageShape(model.dense_layers, 10, is_first=True, is_last=False)
    last = StageShape(0, model.moe_layers - 10, is_first=False, is_last=True)
    assert sum(sum(stage_parameters(model, stage)) for stage in (first, last)) == count.main + count.mtp
