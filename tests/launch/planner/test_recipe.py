"""Recipes without known figures are refused."""

from dataclasses import replace

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.comm.topology import Topology
from shoestring.launch.planner.forecast import ParallelLayout, StepForecaster
from shoestring.launch.planner.recipe import ForecastRecipe
from shoestring.tests.launch.planner.v3 import simulated

GRID = Topology(pp=4, edp=1, ep=8, gpus_per_node=8)


def test_figures_that_are_not_known_are_refused() -> None:
    simulation = simulated()
    layout = ParallelLayout(GRID, "1f1b")
    for name in ("nvlink_gb_per_second", "infiniband_gb_per_second", "memory_gb_per_second"):
        cluster = replace(simulation.config.cluster, **{name: None})  # type: ignore[arg-type]
        forecaster = StepForecaster(replace(simulation.config.model, num_hidden_layers=12), cluster, 4096)
        with pytest.raises(ConfigError, match=rf"cluster\.{name} = None: is not known for h800"):
            forecaster.forecast(layout, ForecastRecipe(), 8 * GRID.dp)
