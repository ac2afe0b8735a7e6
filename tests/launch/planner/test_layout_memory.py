"""Memory by simulation: live tensors, and figures that other projects counted."""

import pytest

from shoestring.launch.planner.layout_memory import workspace_from_shape
from shoestring.launch.planner.operations import LayerWorkload
from shoestring.launch.planner.recipe import RECOMPUTE_DEEPSEEK_V3, RECOMPUTE_NOTHING, ForecastRecipe, GemmPrecision
from shoestring.parallelism.pipeline.communication import derive_p2p_batches
from shoestring.parallelism.pipeline.liveness import peak_instructions
from shoestring.parallelism.pipeline.program import count_in_flight
from shoestring.parallelism.pipeline.schedules.registry import build_program
from shoestring.trainer.model.recompute import RecomputeModule

from .v3 import simulated

MIB = 2**20


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zb_h1", "dualpipe", "dualpipev"])
def test_the_peak_is_that_of_the_program(schedule: str) -> None:
    program = build_program(schedule, 4, 12)
    peaks = [max(alive) for alive in count_in_flight(program)]
    of_ranks = [peak_instructions(program, *each) for each in enumerate(derive_p2p_batches(program))]
    found = [max(sum(moment.micro_batches_in_memory) for moment in worst) for worst in of_ranks]
    assert found == peaks


def routed_layer(precision: GemmPrecision, recompute: frozenset[RecomputeModule]) -> float:
    """Return the MiB that a layer with routed experts keeps of one micro-batch, its input included."""
    shape = LayerWorkload(simulated().config.model, 4096, 1, 64)
    working = workspace_from_shape(shape, ForecastRecipe(precision=precision, recompute=recompute))
    return working.layer_bytes(is_dense=False) / MIB


def test_a_routed_layer_keeps_what_others_count() -> None:
    """Megatron-MoE-ModelZoo's tool has 1,020 MiB with the report's savings in BF16, and 2,236 without. Of these, 448
    are expert results that are not kept here, because gates multiply before the last product. The 112 MiB that it
    does not have are the FP32 norm before the router. In FP8 about 0.62 GB was expected.
    """
    bf16 = {how: routed_layer(GemmPrecision.BF16, how) for how in (RECOMPUTE_NOTHING, RECOMPUTE_DEEPSEEK_V3)}
    assert bf16[RECOMPUTE_NOTHING] == pytest.approx(2236 - 448 + 112, rel=0.07)
    assert bf16[RECOMPUTE_DEEPSEEK_V3] == pytest.approx(1020, rel=0.03)
    assert routed_layer(GemmPrecision.FP8, RECOMPUTE_DEEPSEEK_V3) * MIB == pytest.approx(0.62e9, rel=0.05)
