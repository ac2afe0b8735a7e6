"""The whole planner: the forecast matches the published run without fitting, and the run fits into memory."""

from dataclasses import replace

import pytest

from shoestring.launch.planner.published import PUBLISHED_STEP_SECONDS
from shoestring.launch.planner.recipe import RECOMPUTE_NOTHING
from shoestring.launch.verbs.simulate import simulate
from shoestring.tests.launch.planner.v3 import simulated


def test_the_published_step_is_met_without_fitting() -> None:
    forecast = simulated().forecast
    assert forecast.flops_per_token.main_model == pytest.approx(250.4e9, rel=5e-4)
    assert forecast.step_seconds == pytest.approx(PUBLISHED_STEP_SECONDS, rel=0.12)
    assert forecast.gpu_hours(14.8e12) == pytest.approx(2.664e6, rel=0.12)


def test_it_fits_with_the_reports_savings_and_not_without() -> None:
    simulation = simulated()
    limit = simulation.config.cluster.memory_gb
    assert limit is not None
    assert simulation.forecast.peak_memory.total < 80e9
    assert simulation.forecast.peak_bytes_with_fragmentation < limit * 1e9
    without = simulation.forecast_with(replace(simulation.forecast.recipe, recompute=RECOMPUTE_NOTHING))
    assert without.peak_memory.total > 80e9
    assert without.peak_bytes_with_fragmentation > limit * 1e9


def test_deepeps_buffer_is_what_does_not_fit() -> None:
    """It takes 4.88 GB in place of the 1 GB that NCCL's all-to-alls are assumed to take."""
    simulation = simulate(["experiment=deepseek_v3_h800", "exchange=deepep"], None, {})
    limit, needed = simulation.config.cluster.memory_gb, simulation.forecast.peak_bytes_with_fragmentation
    assert limit is not None
    assert needed - 3.88e9 < limit * 1e9 < needed
