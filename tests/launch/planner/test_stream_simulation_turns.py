"""Real and simulated chunks of an FB alternate between forward and backward in the same order."""

from collections.abc import Callable
from typing import Any

import pytest

from shoestring.launch.planner.layout_memory import workspace_from_shape
from shoestring.launch.planner.stream_simulation import SimulatedChunk, SimulatedStreams
from shoestring.parallelism.pipeline.chunk_walk import StageShape
from shoestring.parallelism.pipeline.instruction import Resumable, interleave, run_to_completion
from shoestring.parallelism.weight_grad import DelayedWeightGradients
from shoestring.tests.trainer.model.small_chunk import CONFIG, ROUTED_LAYERS, SCALES, make_chunk, window
from shoestring.trainer.memory.chunk import ChunkMemorySimulator, MeteredChunk, PeakMeter

from .v3 import simulated

# The layers of `CONFIG`; V3 has as many MTP modules.
STAGE = StageShape(
    CONFIG.first_k_dense_replace, CONFIG.num_hidden_layers - CONFIG.first_k_dense_replace, is_first=True, is_last=True
)
Halves = tuple[Resumable[Any], Resumable[Any]]


def computed() -> Halves:
    chunk, _ = make_chunk()
    ahead = run_to_completion(chunk.forward(*window(), SCALES))
    return ahead.backward(None, DelayedWeightGradients()), chunk.forward(*window(), SCALES)


def timed() -> Halves:
    simulation = simulated()
    own = simulation.forecaster.chunk_time_model(simulation.layout, simulation.forecast.recipe)
    chunk = SimulatedChunk(STAGE, own, SimulatedStreams(), wait_for_peers=False)
    return chunk.backward(deferred=False), chunk.forward()


def weighed() -> Halves:
    simulation = simulated()
    recipe = simulation.forecast.recipe
    own = simulation.forecaster.chunk_time_model(simulation.layout, recipe)
    chunk = MeteredChunk(ChunkMemorySimulator(STAGE, workspace_from_shape(own.shape, recipe)), PeakMeter())
    run_to_completion(chunk.forward())
    return chunk.backward(deferred=False), chunk.forward()


def noting(name: str, steps: Resumable[None], turns: list[str]) -> Resumable[None]:
    """Yield the same steps; append `name` to `turns` after each."""
    sent: bool | None = None
    while True:
        try:
            steps.send(sent)
        except StopIteration:
            return
        turns.append(name)
        sent = yield


@pytest.mark.parametrize("make", [computed, timed, weighed])
def test_both_take_three_turns_per_layer(make: Callable[[], Halves]) -> None:
    backward, forward = make()
    turns: list[str] = []
    interleave(noting("B", backward, turns), noting("F", forward, turns))
    assert turns == ["B", "F"] * 3 * ROUTED_LAYERS


@pytest.mark.parametrize("make", [computed, timed, weighed])
def test_alone_each_takes_two(make: Callable[[], Halves]) -> None:
    backward, forward = make()
    turns: list[str] = []
    run_to_completion(noting("B", backward, turns))
    run_to_completion(noting("F", forward, turns))
    assert turns == ["B"] * 2 * ROUTED_LAYERS + ["F"] * 2 * ROUTED_LAYERS
