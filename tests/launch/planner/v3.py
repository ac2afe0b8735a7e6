"""DeepSeek-V3 on 2048 H800, built once for all tests."""

from functools import cache

from shoestring.launch.planner.stream_simulation import ChunkTimeModel
from shoestring.launch.verbs.simulate import SimulatedLayout, simulate


@cache
def simulated() -> SimulatedLayout:
    return simulate(["experiment=deepseek_v3_h800"], None, {})


def costs() -> ChunkTimeModel:
    simulation = simulated()
    return simulation.forecaster.chunk_time_model(simulation.layout, simulation.forecast.recipe)
