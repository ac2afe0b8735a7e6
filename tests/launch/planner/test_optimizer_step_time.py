"""The end of a step: the exposed time of its collectives, from the program."""

from dataclasses import replace

import pytest

from shoestring.comm.topology import Topology
from shoestring.launch.planner.optimizer_step_time import (
    OptimizerStepTimeModel,
    RankParameters,
    WeightLiveness,
    exposed_all_gather_seconds,
    exposed_reduce_scatter_seconds,
)
from shoestring.launch.planner.recipe import ForecastRecipe
from shoestring.parallelism.pipeline.chunk_walk import StageShape
from shoestring.parallelism.pipeline.schedules.registry import build_program
from shoestring.parallelism.pipeline.simulate import OpDurations, SimulatedTimes, simulate_program
from shoestring.trainer.costs.parameters import count_parameters

from .v3 import simulated


def run(schedule: str, ranks: int, micro_batches: int) -> tuple[WeightLiveness, SimulatedTimes]:
    program = build_program(schedule, ranks, micro_batches)
    return WeightLiveness.from_program(program), simulate_program(program, OpDurations(1.0, 1.0, 1.0), 0.0)


def test_one_rank_hides_nothing() -> None:
    uses, played = run("1f1b", 1, 4)
    assert exposed_reduce_scatter_seconds(uses, played, [2.0]) == 2.0
    assert exposed_all_gather_seconds(uses, played, [1.0]) == 1.0


def test_the_last_stage_reduces_while_others_go_back() -> None:
    """The last backward of 1F1B moves from the last stage to the first, two time units per stage."""
    uses, played = run("1f1b", 4, 8)
    assert exposed_reduce_scatter_seconds(uses, played, [2.0] * 4) == 2.0  # of the first stage alone
    assert exposed_reduce_scatter_seconds(uses, played, [2.0, 2.0, 2.0, 9.0]) == 3.0  # six units are hidden


def test_later_stages_need_their_weights_later() -> None:
    uses, played = run("1f1b", 4, 8)
    assert exposed_all_gather_seconds(uses, played, [1.0] * 4) == 1.0
    assert exposed_all_gather_seconds(uses, played, [0.0, 0.0, 0.0, 5.0]) == 2.0


def test_replicas_of_a_stage_go_together() -> None:
    """DualPipe's ranks 0 and 3 both hold the first and the last stage."""
    uses, played = run("dualpipe", 4, 8)
    assert [set(ranks) for ranks in uses.last_use_by_stage] == [{0, 3}, {1, 2}, {1, 2}, {0, 3}]
    assert 0.0 < exposed_reduce_scatter_seconds(uses, played, [1.0, 0.0, 0.0, 0.0]) <= 1.0


def test_no_more_shows_than_is_sent() -> None:
    simulation = simulated()
    table = simulation.forecaster.chunk_time_model(simulation.layout, simulation.forecast.recipe).compute_model.table
    updates = OptimizerStepTimeModel(simulation.config.cluster, ForecastRecipe(), table, simulation.layout.topology)
    ranks = simulation.forecaster.parameters_by_rank(simulation.layout)
    sent = max(updates.collective_seconds(held, 4) + updates.collective_seconds(held, 2) for held in ranks)
    assert 0.0 < simulation.forecast.exposed_collective_seconds < sent
    moments = [
        OptimizerStepTimeModel(updates.cluster, ForecastRecipe(moment_bytes=size), table, updates.topology)
        for size in (4, 8)
    ]
    held = simulation.forecaster.parameters_by_rank(simulation.layout)[0]
    assert moments[1].optimizer_seconds(held) > moments[0].optimizer_seconds(held)


def test_a_wider_pipe_shows_less() -> None:
    simulation = simulated()
    faster = simulation.forecast_with(replace(simulation.forecast.recipe, link_speed_factor=2.0))
    assert faster.exposed_collective_seconds == pytest.approx(
        simulation.forecast.exposed_collective_seconds / 2, rel=0.1
    )


@pytest.mark.parametrize("mtp_depth", [0, 1])
def test_parameters_of_all_stages_are_the_models(mtp_depth: int) -> None:
    """The last stage also holds the embedding if there is MTP."""
    model = replace(simulated().config.model, num_nextn_predict_layers=mtp_depth)
    count = count_parameters(model)
    first = StageShape(model.first_k_dense_replace, 10, is_first=True, is_last=False)
    last = StageShape(0, model.num_moe_layers - 10, is_first=False, is_last=True)
    whole = replace(first, moe_layers=model.num_moe_layers, is_last=True)
    held = [RankParameters.of_stages(model, Topology(), 1, stages) for stages in ([first], [last], [first, last])]
    assert [each.dense + each.routed for each in held[2:]] == [count.main + count.mtp]
    assert held[2] == RankParameters.of_stages(model, Topology(), 1, [whole])
    replica = count.embedding if mtp_depth else 0
    assert sum(each.dense + each.routed for each in held[:2]) == count.main + count.mtp + replica
