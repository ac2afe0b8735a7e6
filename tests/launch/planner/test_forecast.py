"""A step of DeepSeek-V3 from kernel and link figures, and properties of every forecast."""

from dataclasses import replace

import pytest

from shoestring.comm.topology import Topology
from shoestring.launch.planner.forecast import ParallelLayout, StepForecaster
from shoestring.launch.planner.published import seconds_by_published_phase
from shoestring.launch.planner.recipe import RECOMPUTE_EVERYTHING, RECOMPUTE_NOTHING, ForecastRecipe, GemmPrecision
from shoestring.launch.verbs.simulate import published_step_errors
from shoestring.tests.launch.planner.v3 import simulated
from shoestring.trainer.ledger.terms import STEP_TIME_TERMS
from shoestring.trainer.model.recompute import RecomputeModule

GRID = Topology(pp=4, edp=1, ep=8, gpus_per_node=8)


SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb_h1", "dualpipe", "dualpipev")


def test_uneven_stages_and_pipeline_sends_each_cost_and_are_shown_apart() -> None:
    rows = published_step_errors(simulated())
    ideal, sends, uneven, both = (seconds for _, seconds, _ in rows[:4])
    assert ideal < sends < both
    assert ideal < uneven < both
    assert all(name.startswith("what-if") for name, _, _ in rows[4:])
    assert both == simulated().forecast.step_seconds


def test_messages_take_bytes_over_bandwidth() -> None:
    simulation = simulated()
    assert simulation.forecast.p2p_seconds == pytest.approx(4096 * 7168 * 2 / 40e9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_terms_of_each_rank_sum_up_to_the_step_and_no_step_is_under_its_bound(schedule: str) -> None:
    forecaster = small()
    for micro_batches in (8, 16):
        layout = ParallelLayout(GRID, schedule)
        forecast = forecaster.forecast(layout, ForecastRecipe(), micro_batches * GRID.dp)
        for terms in forecast.time_terms_by_rank:
            assert set(terms) == set(STEP_TIME_TERMS)
            assert sum(terms.values()) == pytest.approx(forecast.step_seconds)
        assert forecast.step_seconds >= forecaster.step_seconds_lower_bound(
            layout, ForecastRecipe(), micro_batches * GRID.dp
        )
        assert sum(forecast.deepseek_report_terms().values()) == pytest.approx(forecast.step_seconds)
        assert sum(seconds_by_published_phase(forecast).values()) == pytest.approx(forecast.step_seconds)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_waiting_is_bubble_in_a_program_of_equal_stages_and_imbalance_beyond(schedule: str) -> None:
    forecaster, layout = small(), ParallelLayout(GRID, schedule)
    equal = forecaster.forecast(layout, ForecastRecipe(uneven_stages=False, p2p_takes_time=False), 8 * GRID.dp)
    assert 0.0 < equal.bubble_seconds == pytest.approx(equal.mean_time_terms["pipeline_wait"])
    slowed = forecaster.forecast(
        layout, ForecastRecipe(uneven_stages=False, p2p_takes_time=False, slowdown_by_pp_rank=((1, 1.5),)), 8 * GRID.dp
    )
    assert slowed.deepseek_report_terms()["imbalance"] > 0.1 * slowed.mean_time_terms["pipeline_wait"]


def test_inputs_that_disturb_make_a_step_longer() -> None:
    forecaster, layout, batch = small(), ParallelLayout(GRID, "dualpipe"), 16 * GRID.dp
    base = forecaster.forecast(layout, ForecastRecipe(), batch).step_seconds
    slower = (
        ForecastRecipe(skew=0.2),
        ForecastRecipe(jitter=0.014),
        ForecastRecipe(slowdown_by_pp_rank=((0, 1.08),)),
        ForecastRecipe(p2p_seconds=8.5e-3),
    )
    for recipe in slower:
        assert forecaster.forecast(layout, recipe, batch).step_seconds > base
    for recipe in (ForecastRecipe(link_speed_factor=1.1), ForecastRecipe(comm_sms=6)):
        assert forecaster.forecast(layout, recipe, batch).step_seconds < base


def test_halves_one_after_the_other_hide_nothing() -> None:
    simulation = simulated()
    overlapped = simulation.forecast
    apart = simulation.forecast_with(replace(overlapped.recipe, overlap=False))
    assert apart.step_seconds > 1.1 * overlapped.step_seconds
    assert apart.mean_time_terms["exposed_all_to_all"] > overlapped.mean_time_terms["exposed_all_to_all"]
    assert apart.mean_time_terms["FB"] == pytest.approx(overlapped.mean_time_terms["FB"], rel=0.01)


def test_recomputation_takes_time() -> None:
    forecaster, layout, batch = small(), ParallelLayout(GRID, "dualpipe"), 16 * GRID.dp
    policies = [
        RECOMPUTE_NOTHING,
        frozenset({RecomputeModule.UP_PROJECTION}),
        frozenset({RecomputeModule.UP_PROJECTION, RecomputeModule.ATTENTION}),
        RECOMPUTE_EVERYTHING,
    ]
    recipes = [ForecastRecipe(precision=GemmPrecision.BF16, recompute=policy) for policy in policies]
    steps = [forecaster.forecast(layout, recipe, batch).step_seconds for recipe in recipes]
    assert steps == sorted(set(steps))


def small() -> StepForecaster:
    simulation = simulated()
    model = replace(simulation.config.model, num_hidden_layers=12)
    return StepForecaster(model, simulation.config.cluster, 4096)
