"""A step of DeepSeek-V3 from kernel and link figures, and what holds of every forecast."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoestring.comm.topology import Topology
from shoestring.launch.planner.forecast import Forecaster, Layout
from shoestring.launch.planner.published import STEP_SECONDS
from shoestring.launch.planner.recipe import Recipe, Recompute
from shoestring.launch.simulate import error_rows

from .v3 import simulated

GRID = Topology(pp=4, edp=1, ep=8, gpus_per_node=8)
SCHEDULES = ("gpipe", "one_f_one_b", "interleaved", "zb1p", "dualpipe", "dualpipev")


def test_the_published_step_is_met_without_fitting() -> None:
    forecast = simulated().forecast
    assert forecast.flops.main == pytest.approx(250.4e9, rel=5e-4)
    assert forecast.seconds == pytest.approx(STEP_SECONDS, rel=0.12)
    assert forecast.gpu_hours(14.8e12) == pytest.approx(2.664e6, rel=0.12)


def test_it_fits_with_the_reports_savings_and_not_without() -> None:
    simulation = simulated()
    assert simulation.config.cluster.memory_gb is not None
    room = simulation.config.cluster.memory_gb * 1e9
    assert simulation.forecast.peak_memory.total < room
    without = simulation.again(replace(simulation.forecast.recipe, recompute=Recompute.NONE))
    assert without.peak_memory.total > room


def test_imbalance_and_messages_each_cost_and_are_shown_apart() -> None:
    rows = error_rows(simulated())
    neither, messages, imbalance, both = (seconds for _, seconds, _ in rows[:4])
    assert neither < messages < both
    assert neither < imbalance < both
    assert all(name.startswith("unidentified") for name, _, _ in rows[4:])
    assert both == simulated().forecast.seconds


def test_messages_take_bytes_over_bandwidth() -> None:
    simulation = simulated()
    assert simulation.forecast.transfer == pytest.approx(4096 * 7168 * 2 / 40e9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_terms_sum_up_to_the_makespan_and_no_step_is_under_its_bound(schedule: str) -> None:
    forecaster = small()
    for micro_batches in (8, 16):
        layout = Layout(GRID, schedule)
        forecast = forecaster.forecast(layout, Recipe(), micro_batches * GRID.dp)
        for terms in forecast.terms:
            assert sum(terms.values()) == pytest.approx(forecast.replay.makespan)
        assert forecast.seconds >= forecaster.lower_bound(layout, Recipe(), micro_batches * GRID.dp)
        assert sum(forecast.report_view().values()) == pytest.approx(forecast.seconds)


def test_inputs_that_disturb_make_a_step_longer() -> None:
    forecaster, layout, batch = small(), Layout(GRID, "dualpipe"), 16 * GRID.dp
    base = forecaster.forecast(layout, Recipe(), batch).seconds
    slower = Recipe(skew=0.2), Recipe(jitter=0.014), Recipe(slowed=((0, 1.08),)), Recipe(message_seconds=8.5e-3)
    for recipe in slower:
        assert forecaster.forecast(layout, recipe, batch).seconds > base
    for recipe in (Recipe(links=1.1), Recipe(comm_sms=6)):
        assert forecaster.forecast(layout, recipe, batch).seconds < base


def small() -> Forecaster:
    simulation = simulated()
    model = replace(simulation.config.model, layers=12)
    return Forecaster(model, simulation.config.cluster, 4096)
