"""The search never discards the best layout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoestring.launch.planner.forecast import Forecaster
from shoestring.launch.planner.recipe import Precision, Recipe, Recompute
from shoestring.launch.planner.search import Space, search

from .v3 import simulated


@pytest.mark.parametrize(("gpus", "layers", "batch"), [(32, 8, 64), (32, 6, 128), (64, 12, 256)])
def test_what_bounds_exclude_is_not_among_the_best(gpus: int, layers: int, batch: int) -> None:
    config = simulated().config
    forecaster = Forecaster(replace(config.model, layers=layers), config.cluster, 4096)
    space = Space(
        gpus, 8, micro_batches=(1, 2), recomputes=(Recompute.REPORT, Recompute.FULL), precisions=(Precision.FP8,)
    )
    candidates = list(space.candidates(Recipe()))
    pruned = search(forecaster, candidates, batch, keep=3)
    whole = search(forecaster, candidates, batch, keep=3, exhaustive=True)
    assert pruned.excluded > 0
    assert [(f.layout, f.recipe) for f in pruned.best] == [(f.layout, f.recipe) for f in whole.best]
    assert whole.excluded == 0
    for result in (pruned, whole):
        counted = sum(result.illegal.values()) + sum(result.unfit.values()) + result.simulated + result.excluded
        assert counted == result.considered
    assert pruned.smallest_excluded is not None
    assert pruned.smallest_excluded > pruned.best[-1].seconds


def test_what_does_not_fit_is_counted_apart() -> None:
    config = simulated().config
    forecaster = Forecaster(config.model, config.cluster, 4096)
    result = search(forecaster, list(Space(64, 8, micro_batches=(1,)).candidates(Recipe())), 256)
    assert not result.best  # 671 B parameters on 64 GPUs
    assert result.unfit["weights, gradients and optimizer alone"] > 0
