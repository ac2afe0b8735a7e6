"""In an FB the chunks that compute and those on paper take the same turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from shoestring.launch.planner.lanes import Lanes, SimulatedChunk
from shoestring.launch.planner.layout_memory import working_of
from shoestring.parallelism.pipeline.executor import Steps, drive, take_turns
from shoestring.parallelism.weight_grad import WeightGradients
from shoestring.tests.trainer.model.small_chunk import CONFIG, ROUTED_LAYERS, SCALES, make_chunk, window
from shoestring.trainer.memory.chunk import ChunkMemory, PeakMeter, StageShape

from .v3 import simulated

# What `CONFIG` holds, and V3 has as many MTP modules.
STAGE = StageShape(
    CONFIG.first_k_dense_replace, CONFIG.num_hidden_layers - CONFIG.first_k_dense_replace, is_first=True, is_last=True
)
Halves = tuple[Steps[Any], Steps[Any]]


def computed() -> Halves:
    chunk, _ = make_chunk()
    ahead = drive(chunk.forward(*window(), SCALES))
    return ahead.backward(None, WeightGradients()), chunk.forward(*window(), SCALES)


def timed() -> Halves:
    simulation = simulated()
    own = simulation.forecaster.costs(simulation.layout, simulation.forecast.recipe)
    chunk = SimulatedChunk(STAGE, own.shape, own.cost, own.wire, Lanes(), waits=False)
    return chunk.backward(weights=True), chunk.forward()


def weighed() -> Halves:
    simulation = simulated()
    recipe = simulation.forecast.recipe
    own = simulation.forecaster.costs(simulation.layout, recipe)
    chunk, meter = ChunkMemory(STAGE, working_of(own.shape, recipe)), PeakMeter()
    drive(chunk.forward(meter))
    return chunk.backward(meter, deferred=False), chunk.forward(meter)


def noting(name: str, steps: Steps[None], turns: list[str]) -> Steps[None]:
    """The same steps, each noted when it has been taken."""
    sent: bool | None = None
    while True:
        try:
            steps.send(sent)
        except StopIteration:
            return
        turns.append(name)
        sent = yield


@pytest.mark.parametrize("make", [computed, timed, weighed])
def test_both_take_three_turns_a_layer(make: Callable[[], Halves]) -> None:
    backward, forward = make()
    turns: list[str] = []
    take_turns(noting("B", backward, turns), noting("F", forward, turns))
    assert turns == ["B", "F"] * 3 * ROUTED_LAYERS


@pytest.mark.parametrize("make", [computed, timed, weighed])
def test_alone_each_takes_two(make: Callable[[], Halves]) -> None:
    backward, forward = make()
    turns: list[str] = []
    drive(noting("B", backward, turns))
    drive(noting("F", forward, turns))
    assert turns == ["B"] * 2 * ROUTED_LAYERS + ["F"] * 2 * ROUTED_LAYERS
