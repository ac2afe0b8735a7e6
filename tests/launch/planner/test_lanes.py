"""Two lanes: what hides behind computing and what does not, in the runtime's order."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoestring.comm.trace import Track
from shoestring.launch.planner.exchange_time import ExchangeTime
from shoestring.launch.planner.lanes import ChunkCosts, Lanes
from shoestring.launch.planner.operations import ComputePhase
from shoestring.launch.planner.published import TRACED
from shoestring.launch.planner.recipe import Sync
from shoestring.tests.launch.planner.v3 import costs, simulated
from shoestring.trainer.memory.chunk import StageShape


def test_an_exchange_hides_behind_computing() -> None:
    lanes = Lanes()
    flight = lanes.launch(ExchangeTime("dispatch", beside=2.0, alone=1.0))
    lanes.compute(ComputePhase.EXPERTS_F, 3.0)
    lanes.wait(flight)
    assert (lanes.now, lanes.exposed, lanes.exchanging) == (3.0, 0.0, 2.0)


def test_what_is_left_travels_at_its_own_pace() -> None:
    lanes = Lanes()
    flight = lanes.launch(ExchangeTime("dispatch", beside=4.0, alone=1.0), sync=1.0)
    lanes.compute(ComputePhase.EXPERTS_F, 3.0)  # 1 of waiting for others, then half of the way
    lanes.wait(flight)
    assert lanes.now == pytest.approx(3.5)
    assert lanes.exposed == pytest.approx(0.5)


def test_exchanges_travel_one_after_the_other() -> None:
    lanes = Lanes()
    first, second = (lanes.launch(ExchangeTime(name, beside=2.0, alone=2.0)) for name in ("a", "b"))
    lanes.wait(first)
    assert lanes.now == 2.0
    lanes.wait(second)
    assert lanes.now == 4.0
    assert [span.name for span in lanes.spans if span.track is Track.EXCHANGE] == ["a", "b"]


def test_a_pair_is_shorter_than_its_halves() -> None:
    own = costs()
    pair, alone = own.run("FB", TRACED, TRACED), [own.run("F", TRACED, None), own.run("B", None, TRACED)]
    assert pair.now < sum(lanes.now for lanes in alone)
    assert pair.now >= own.compute_seconds(TRACED)


def test_an_i_and_its_w_compute_what_a_b_does() -> None:
    own = costs()
    whole, inputs, weights = own.run("B", None, TRACED), own.run("I", None, TRACED), own.run("W", None, TRACED)
    assert inputs.now - inputs.exposed + weights.now == pytest.approx(whole.now - whole.exposed)


def test_no_exchange_where_all_experts_are_here() -> None:
    own = costs()
    local = ChunkCosts(replace(own.shape, expert_ranks=1), own.cost, own.wire)
    assert local.run("F", TRACED, None).exposed == 0.0
    assert local.run("F", TRACED, None).exchanging == 0.0


def test_waits_for_others_are_where_they_were_measured() -> None:
    simulation = simulated()
    base = simulation.forecast.recipe
    own = {sync: simulation.forecaster.costs(simulation.layout, replace(base, sync=sync)) for sync in Sync}
    alone = {sync: own[sync].run("F", TRACED, None).now for sync in Sync}
    assert alone[Sync.PAIRS] == alone[Sync.NONE] < alone[Sync.EVERYWHERE]
    last = StageShape(dense=0, routed=1, is_first=False, is_last=True)
    paired = {sync: own[sync].run("FB", last, TRACED).now for sync in Sync}
    assert paired[Sync.PAIRS] == paired[Sync.EVERYWHERE] > paired[Sync.NONE]
