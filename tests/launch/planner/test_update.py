"""The end of a step: what of the collectives shows, by the program."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoestring.launch.planner.recipe import Recipe
from shoestring.launch.planner.update import CollectiveSeconds, Updates, WeightUses, exposed_gather, exposed_reduce
from shoestring.parallelism.pipeline.schedules.registry import build_program
from shoestring.parallelism.pipeline.simulate import ProgramTimes, UnitTimes, simulate_program

from .v3 import simulated


def run(schedule: str, ranks: int, micro_batches: int) -> tuple[WeightUses, ProgramTimes]:
    program = build_program(schedule, ranks, micro_batches)
    return WeightUses.of(program), simulate_program(program, UnitTimes(1.0, 1.0, 1.0), 0.0)


def test_one_rank_hides_nothing() -> None:
    uses, played = run("one_f_one_b", 1, 4)
    traffic = [CollectiveSeconds(reduce=2.0, gather=1.0)]
    assert exposed_reduce(uses, played, traffic) == 2.0
    assert exposed_gather(uses, played, traffic) == 1.0


def test_the_last_stage_reduces_while_others_go_back() -> None:
    """The last backward of 1F1B moves from the last stage to the first, two units a stage."""
    uses, played = run("one_f_one_b", 4, 8)
    small, large = [CollectiveSeconds(2.0, 0.0)] * 4, [CollectiveSeconds(2.0, 0.0)] * 3 + [CollectiveSeconds(9.0, 0.0)]
    assert exposed_reduce(uses, played, small) == 2.0  # of the first stage alone
    assert exposed_reduce(uses, played, large) == 3.0  # six units are hidden


def test_weights_are_wanted_later_further_down() -> None:
    uses, played = run("one_f_one_b", 4, 8)
    assert exposed_gather(uses, played, [CollectiveSeconds(0.0, 1.0)] * 4) == 1.0
    assert exposed_gather(uses, played, [CollectiveSeconds(0.0, 0.0)] * 3 + [CollectiveSeconds(0.0, 5.0)]) == 2.0


def test_replicas_of_a_stage_go_together() -> None:
    """DualPipe's ranks 0 and 3 hold the first and the last stage both."""
    uses, played = run("dualpipe", 4, 8)
    assert [set(ranks) for ranks in uses.last] == [{0, 3}, {1, 2}, {1, 2}, {0, 3}]
    one = [CollectiveSeconds(1.0, 0.0)] + [CollectiveSeconds(0.0, 0.0)] * 3
    assert 0.0 < exposed_reduce(uses, played, one) <= 1.0


def test_no_more_shows_than_is_sent() -> None:
    simulation = simulated()
    table = simulation.forecaster.costs(simulation.layout, simulation.forecast.recipe).cost.table
    updates = Updates(simulation.config.cluster, Recipe(), table, simulation.layout.topology)
    sent = max(map(updates.traffic, simulation.forecaster.parameters(simulation.layout)), key=lambda t: t.reduce)
    assert 0.0 < simulation.forecast.reduce < sent.reduce + sent.gather
    moments = [Updates(updates.cluster, Recipe(moment_bytes=size), table, updates.topology) for size in (4, 8)]
    held = simulation.forecaster.parameters(simulation.layout)[0]
    assert moments[1].optimizer(held) > moments[0].optimizer(held)


def test_a_wider_pipe_shows_less() -> None:
    simulation = simulated()
    faster = simulation.again(replace(simulation.forecast.recipe, links=2.0))
    assert faster.reduce == pytest.approx(simulation.forecast.reduce / 2, rel=0.1)
