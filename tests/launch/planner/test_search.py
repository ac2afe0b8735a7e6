"""The search never discards the best layout."""

from dataclasses import replace

import pytest

from shoestring.launch.planner.forecast import StepForecaster, bytes_with_fragmentation
from shoestring.launch.planner.recipe import RECOMPUTE_DEEPSEEK_V3, RECOMPUTE_EVERYTHING, ForecastRecipe, GemmPrecision
from shoestring.launch.planner.search import SearchSpace, find_memory_problem, search_layouts

from .v3 import simulated


@pytest.mark.parametrize(("gpus", "layers", "batch"), [(32, 8, 64), (32, 6, 128), (64, 12, 256)])
def test_what_bounds_exclude_is_not_among_the_best(gpus: int, layers: int, batch: int) -> None:
    config = simulated().config
    forecaster = StepForecaster(replace(config.model, num_hidden_layers=layers), config.cluster, 4096)
    space = SearchSpace(
        gpus,
        8,
        micro_batches=(1, 2),
        recompute_policies=(RECOMPUTE_DEEPSEEK_V3, RECOMPUTE_EVERYTHING),
        precisions=(GemmPrecision.FP8,),
    )
    candidates = list(space.candidates(ForecastRecipe()))
    pruned = search_layouts(forecaster, candidates, batch, max_results=3)
    whole = search_layouts(forecaster, candidates, batch, max_results=3, exhaustive=True)
    assert pruned.pruned > 0
    assert [(f.layout, f.recipe) for f in pruned.best_forecasts] == [(f.layout, f.recipe) for f in whole.best_forecasts]
    assert whole.pruned == 0
    for result in (pruned, whole):
        counted = sum(result.illegal.values()) + sum(result.out_of_memory.values()) + result.simulated + result.pruned
        assert not result.missing_figures
        assert counted == result.considered
    assert pruned.smallest_pruned_bound is not None
    assert pruned.smallest_pruned_bound > pruned.best_forecasts[-1].step_seconds


def test_what_does_not_fit_is_counted_apart() -> None:
    config = simulated().config
    forecaster = StepForecaster(config.model, config.cluster, 4096)
    result = search_layouts(forecaster, list(SearchSpace(64, 8, micro_batches=(1,)).candidates(ForecastRecipe())), 256)
    assert not result.best_forecasts  # 671 B parameters on 64 GPUs
    assert result.out_of_memory["weights, gradients and optimizer alone"] > 0


def test_room_for_fragmentation_decides_what_fits() -> None:
    simulation = simulated()
    layout, batch = simulation.layout, simulation.global_batch
    roomy, tight = ForecastRecipe(fragmentation=0.1), ForecastRecipe(fragmentation=0.3)
    assert find_memory_problem(simulation.forecaster, layout, roomy, batch) is None
    assert find_memory_problem(simulation.forecaster, layout, tight, batch) == "mostly activations in flight"
    memory = simulation.forecast.peak_memory
    assert bytes_with_fragmentation(memory, tight) == pytest.approx(memory.total + 0.3 * sum(memory.at_peak.values()))


def test_what_a_cluster_does_not_say_is_counted_and_never_free() -> None:
    config = simulated().config
    cluster = replace(config.cluster, infiniband_gb_per_second=None)
    forecaster = StepForecaster(replace(config.model, num_hidden_layers=8), cluster, 4096)
    space = SearchSpace(
        32, 8, micro_batches=(1,), recompute_policies=(RECOMPUTE_DEEPSEEK_V3,), precisions=(GemmPrecision.FP8,)
    )
    result = search_layouts(forecaster, space.candidates(ForecastRecipe()), 64, max_results=3)
    assert not result.best_forecasts  # at least the dense part has replicas in other nodes
    assert set(result.missing_figures) == {"cluster.infiniband_gb_per_second does not say enough"}


def test_the_run_has_the_last_word() -> None:
    config = simulated().config
    forecaster = StepForecaster(replace(config.model, num_hidden_layers=8), config.cluster, 4096)
    space = SearchSpace(
        32, 8, micro_batches=(1,), recompute_policies=(RECOMPUTE_DEEPSEEK_V3,), precisions=(GemmPrecision.FP8,)
    )
    candidates = list(space.candidates(ForecastRecipe()))
    result = search_layouts(forecaster, candidates, 64, find_refusal=lambda layout, recipe: "not today")
    assert not result.best_forecasts
    assert result.illegal["not today"] > 0
