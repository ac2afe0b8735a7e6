"""A step of DeepSeek-V3 from kernel and link figures, and what holds of every forecast."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoestring.comm.topology import Topology
from shoestring.launch.planner.forecast import Forecaster, Layout
from shoestring.launch.planner.published import as_published
from shoestring.launch.planner.recipe import EVERYTHING, NOTHING, Precision, Recipe
from shoestring.launch.verbs.simulate import error_rows
from shoestring.tests.launch.planner.v3 import simulated
from shoestring.trainer.ledger.terms import TERMS
from shoestring.trainer.model.recompute import RecomputeModule

GRID = Topology(pp=4, edp=1, ep=8, gpus_per_node=8)


SCHEDULES = ("gpipe", "one_f_one_b", "interleaved", "zb1p", "dualpipe", "dualpipev")


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
def test_terms_of_each_rank_sum_up_to_the_step_and_no_step_is_under_its_bound(schedule: str) -> None:
    forecaster = small()
    for micro_batches in (8, 16):
        layout = Layout(GRID, schedule)
        forecast = forecaster.forecast(layout, Recipe(), micro_batches * GRID.dp)
        for terms in forecast.terms:
            assert set(terms) == set(TERMS)
            assert sum(terms.values()) == pytest.approx(forecast.seconds)
        assert forecast.seconds >= forecaster.lower_bound(layout, Recipe(), micro_batches * GRID.dp)
        assert sum(forecast.report_view().values()) == pytest.approx(forecast.seconds)
        assert sum(as_published(forecast).values()) == pytest.approx(forecast.seconds)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_waiting_is_bubble_in_a_program_of_equal_stages_and_imbalance_beyond(schedule: str) -> None:
    forecaster, layout = small(), Layout(GRID, schedule)
    equal = forecaster.forecast(layout, Recipe(imbalance=False, edges=False), 8 * GRID.dp)
    assert 0.0 < equal.bubble == pytest.approx(equal.mean_terms["edge_wait"])
    slowed = forecaster.forecast(layout, Recipe(imbalance=False, edges=False, slowed=((1, 1.5),)), 8 * GRID.dp)
    assert slowed.report_view()["imbalance"] > 0.1 * slowed.mean_terms["edge_wait"]


def test_inputs_that_disturb_make_a_step_longer() -> None:
    forecaster, layout, batch = small(), Layout(GRID, "dualpipe"), 16 * GRID.dp
    base = forecaster.forecast(layout, Recipe(), batch).seconds
    slower = Recipe(skew=0.2), Recipe(jitter=0.014), Recipe(slowed=((0, 1.08),)), Recipe(message_seconds=8.5e-3)
    for recipe in slower:
        assert forecaster.forecast(layout, recipe, batch).seconds > base
    for recipe in (Recipe(links=1.1), Recipe(comm_sms=6)):
        assert forecaster.forecast(layout, recipe, batch).seconds < base


def test_halves_one_after_the_other_hide_nothing() -> None:
    simulation = simulated()
    turns, apart = simulation.forecast, simulation.again(replace(simulation.forecast.recipe, overlap=False))
    assert apart.seconds > 1.1 * turns.seconds
    assert apart.mean_terms["exposed_exchange"] > turns.mean_terms["exposed_exchange"]
    assert apart.mean_terms["FB"] == pytest.approx(turns.mean_terms["FB"], rel=0.01)


def test_what_is_made_again_takes_time() -> None:
    forecaster, layout, batch = small(), Layout(GRID, "dualpipe"), 16 * GRID.dp
    policies = [
        NOTHING,
        frozenset({RecomputeModule.UP_PROJECTION}),
        frozenset({RecomputeModule.UP_PROJECTION, RecomputeModule.ATTENTION}),
        EVERYTHING,
    ]
    recipes = [Recipe(precision=Precision.BF16, recompute=policy) for policy in policies]
    steps = [forecaster.forecast(layout, recipe, batch).seconds for recipe in recipes]
    assert steps == sorted(set(steps))


def small() -> Forecaster:
    simulation = simulated()
    model = replace(simulation.config.model, num_hidden_layers=12)
    return Forecaster(model, simulation.config.cluster, 4096)
