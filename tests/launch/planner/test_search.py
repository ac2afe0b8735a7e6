"""The search never discards the best layout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoestring.launch.planner.forecast import Forecaster, needed_bytes
from shoestring.launch.planner.recipe import EVERYTHING, REPORT, Precision, Recipe
from shoestring.launch.planner.search import SearchSpace, search, unfitness

from .v3 import simulated


@pytest.mark.parametrize(("gpus", "layers", "batch"), [(32, 8, 64), (32, 6, 128), (64, 12, 256)])
def test_what_bounds_exclude_is_not_among_the_best(gpus: int, layers: int, batch: int) -> None:
    config = simulated().config
    forecaster = Forecaster(replace(config.model, num_hidden_layers=layers), config.cluster, 4096)
    space = SearchSpace(gpus, 8, micro_batches=(1, 2), recomputes=(REPORT, EVERYTHING), precisions=(Precision.FP8,))
    candidates = list(space.candidates(Recipe()))
    pruned = search(forecaster, candidates, batch, keep=3)
    whole = search(forecaster, candidates, batch, keep=3, exhaustive=True)
    assert pruned.excluded > 0
    assert [(f.layout, f.recipe) for f in pruned.best] == [(f.layout, f.recipe) for f in whole.best]
    assert whole.excluded == 0
    for result in (pruned, whole):
        counted = sum(result.illegal.values()) + sum(result.unfit.values()) + result.simulated + result.excluded
        assert not result.unpriced
        assert counted == result.considered
    assert pruned.smallest_excluded is not None
    assert pruned.smallest_excluded > pruned.best[-1].seconds


def test_what_does_not_fit_is_counted_apart() -> None:
    config = simulated().config
    forecaster = Forecaster(config.model, config.cluster, 4096)
    result = search(forecaster, list(SearchSpace(64, 8, micro_batches=(1,)).candidates(Recipe())), 256)
    assert not result.best  # 671 B parameters on 64 GPUs
    assert result.unfit["weights, gradients and optimizer alone"] > 0


def test_room_for_fragmentation_decides_what_fits() -> None:
    simulation = simulated()
    layout, batch = simulation.layout, simulation.global_batch
    roomy, tight = Recipe(fragmentation=0.1), Recipe(fragmentation=0.3)
    assert unfitness(simulation.forecaster, layout, roomy, batch) is None
    assert unfitness(simulation.forecaster, layout, tight, batch) == "mostly activations in flight"
    memory = simulation.forecast.peak_memory
    comes_and_goes = memory.activations + memory.deferred + memory.working
    assert needed_bytes(memory, tight) == pytest.approx(memory.total + 0.3 * comes_and_goes)


def test_what_a_cluster_does_not_say_is_counted_and_never_free() -> None:
    config = simulated().config
    cluster = replace(config.cluster, infiniband_gbps=None)
    forecaster = Forecaster(replace(config.model, num_hidden_layers=8), cluster, 4096)
    space = SearchSpace(32, 8, micro_batches=(1,), recomputes=(REPORT,), precisions=(Precision.FP8,))
    result = search(forecaster, space.candidates(Recipe()), 64, keep=3)
    assert not result.best  # at least the dense part has replicas in other nodes
    assert set(result.unpriced) == {"cluster.infiniband_gbps does not say enough"}


def test_the_run_has_the_last_word() -> None:
    config = simulated().config
    forecaster = Forecaster(replace(config.model, num_hidden_layers=8), config.cluster, 4096)
    space = SearchSpace(32, 8, micro_batches=(1,), recomputes=(REPORT,), precisions=(Precision.FP8,))
    candidates = list(space.candidates(Recipe()))
    result = search(forecaster, candidates, 64, refusal=lambda layout, recipe: "not today")
    assert not result.best
    assert result.illegal["not today"] > 0
