"""Two streams: hidden and exposed communication, in the runtime's order."""

from dataclasses import replace

import pytest

from shoestring.comm.trace import TimelineTrack
from shoestring.launch.planner.exchange_time import ExchangeTime
from shoestring.launch.planner.operations import ComputePhase
from shoestring.launch.planner.published import TRACED_STAGE
from shoestring.launch.planner.recipe import PeerWaits
from shoestring.launch.planner.stream_simulation import ChunkTimeModel, SimulatedStreams
from shoestring.parallelism.pipeline.chunk_walk import StageShape
from shoestring.tests.launch.planner.v3 import costs, simulated


def test_an_exchange_hides_behind_computing() -> None:
    streams = SimulatedStreams()
    flight = streams.launch_exchange(ExchangeTime("dispatch", overlapped_seconds=2.0, standalone_seconds=1.0))
    streams.run_compute(ComputePhase.ROUTED_EXPERTS_F, 3.0)
    streams.wait_for_exchange(flight)
    assert (streams.elapsed_seconds, streams.exposed_seconds, streams.exchange_seconds) == (3.0, 0.0, 2.0)


def test_an_exchange_without_compute_runs_at_full_speed() -> None:
    streams = SimulatedStreams()
    flight = streams.launch_exchange(ExchangeTime("dispatch", overlapped_seconds=4.0, standalone_seconds=1.0), sync=1.0)
    streams.run_compute(ComputePhase.ROUTED_EXPERTS_F, 3.0)  # 1 of waiting for others, then half of the way
    streams.wait_for_exchange(flight)
    assert streams.elapsed_seconds == pytest.approx(3.5)
    assert streams.exposed_seconds == pytest.approx(0.5)


def test_exchanges_travel_one_after_the_other() -> None:
    streams = SimulatedStreams()
    first, second = (
        streams.launch_exchange(ExchangeTime(name, overlapped_seconds=2.0, standalone_seconds=2.0))
        for name in ("a", "b")
    )
    streams.wait_for_exchange(first)
    assert streams.elapsed_seconds == 2.0
    streams.wait_for_exchange(second)
    assert streams.elapsed_seconds == 4.0
    assert [span.name for span in streams.spans if span.track is TimelineTrack.EXCHANGE] == ["a", "b"]


def test_a_pair_is_shorter_than_its_halves() -> None:
    own = costs()
    pair, alone = (
        own.simulate_instruction("FB", TRACED_STAGE, TRACED_STAGE),
        [own.simulate_instruction("F", TRACED_STAGE, None), own.simulate_instruction("B", None, TRACED_STAGE)],
    )
    assert pair.elapsed_seconds < sum(streams.elapsed_seconds for streams in alone)
    assert pair.elapsed_seconds >= own.compute_seconds(TRACED_STAGE)


def test_an_i_and_its_w_compute_what_a_b_does() -> None:
    own = costs()
    whole, inputs, weights = (
        own.simulate_instruction("B", None, TRACED_STAGE),
        own.simulate_instruction("I", None, TRACED_STAGE),
        own.simulate_instruction("W", None, TRACED_STAGE),
    )
    assert inputs.elapsed_seconds - inputs.exposed_seconds + weights.elapsed_seconds == pytest.approx(
        whole.elapsed_seconds - whole.exposed_seconds
    )


def test_no_exchange_where_all_experts_are_here() -> None:
    own = costs()
    local = ChunkTimeModel(replace(own.shape, ep_size=1), own.compute_model, own.exchange_model)
    assert local.simulate_instruction("F", TRACED_STAGE, None).exposed_seconds == 0.0
    assert local.simulate_instruction("F", TRACED_STAGE, None).exchange_seconds == 0.0


def test_waits_for_others_are_where_they_were_measured() -> None:
    simulation = simulated()
    base = simulation.forecast.recipe
    own = {
        sync: simulation.forecaster.chunk_time_model(simulation.layout, replace(base, peer_waits=sync))
        for sync in PeerWaits
    }
    alone = {sync: own[sync].simulate_instruction("F", TRACED_STAGE, None).elapsed_seconds for sync in PeerWaits}
    assert alone[PeerWaits.OVERLAPPED_PAIRS] == alone[PeerWaits.NONE] < alone[PeerWaits.EVERYWHERE]
    last = StageShape(dense_layers=0, moe_layers=1, is_first=False, is_last=True)
    paired = {sync: own[sync].simulate_instruction("FB", last, TRACED_STAGE).elapsed_seconds for sync in PeerWaits}
    assert paired[PeerWaits.OVERLAPPED_PAIRS] == paired[PeerWaits.EVERYWHERE] > paired[PeerWaits.NONE]
