"""`shoestring plan`: search of the best layouts, with their cost against the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from ...comm.errors import ConfigError, Problem
from ...comm.units import format_giga, format_significant
from ...trainer.config import RunConfig
from ..compose import compose_run_config
from ..planner.compute_time import ComputeTimeModel
from ..planner.config_adapter import (
    comm_sms_limit,
    config_with_layout,
    diff_overrides,
    layout_from_config,
    recipe_from_config,
)
from ..planner.forecast import ParallelLayout, StepForecast, StepForecaster
from ..planner.published import is_deepseek_v3_run
from ..planner.recipe import ForecastRecipe, GemmPrecision
from ..planner.run_cost import (
    FailureModel,
    RunPhaseCost,
    WhatIfStep,
    estimate_phase_costs,
    pretraining_gpu_hours,
    sensitivity_analysis,
)
from ..planner.search import SearchResult, SearchSpace, search_layouts
from ..report.forecast_page import forecast_html
from .simulate import layout_as_dict, phase_cost_table, plan_header, run_description

_RESOLUTION = 0.01
"""Relative difference below which two forecasts count as equal: they share most of their errors, not all."""
NO_FORECAST_INPUTS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class PlannedLayout:
    """A layout with the cost of the run in it."""

    forecast: StepForecast
    phase_costs: list[RunPhaseCost]

    @property
    def pretraining_gpu_hours(self) -> float:
        """GPU-hours of pre-training, batch ramp included."""
        return pretraining_gpu_hours(self.phase_costs)


@dataclass(frozen=True)
class Plan:
    """Result of a search."""

    config: RunConfig
    recipe: ForecastRecipe
    search_result: SearchResult
    best_layouts: tuple[PlannedLayout, ...]
    """Layouts that are legal and fit, fastest first."""
    configured_layout: PlannedLayout
    """Layout of the configuration, for comparison."""
    what_ifs: list[WhatIfStep]
    """Sensitivity of the best layout."""
    failure_model: FailureModel

    @property
    def best_layout(self) -> PlannedLayout | None:
        """Fastest layout that is legal and fits, or None."""
        return self.best_layouts[0] if self.best_layouts else None


def plan(
    overrides: Sequence[str], config_dir: Path | None, keep: int, inputs: Mapping[str, Any] = NO_FORECAST_INPUTS
) -> Plan:
    """Search the layouts of the run that `overrides` describe on all GPUs of its cluster.

    `inputs` are recipe fields that no configuration has; `keep` is the number of layouts. Raises `ConfigError`.
    """
    if keep < 1:
        raise ConfigError([Problem("--keep", keep, "must be at least 1")])
    config = compose_run_config(overrides, config_dir)
    training, recipe = config.training, recipe_from_config(config, inputs)
    forecaster = StepForecaster(config.model, config.cluster, training.sequence_length)
    configured = forecaster.forecast(layout_from_config(config), recipe, training.global_batch_size)
    candidates = _space(config, recipe).candidates(recipe)
    refusal = partial(_refusal, config, comm_sms_limit(config))
    found = search_layouts(forecaster, candidates, training.global_batch_size, keep, find_refusal=refusal)
    rows = tuple(_row(config, forecaster, forecast) for forecast in found.best_forecasts)
    what_ifs: list[WhatIfStep] = []
    if found.best_forecasts:
        what_ifs = sensitivity_analysis(
            forecaster, found.best_forecasts[0].layout, found.best_forecasts[0].recipe, training.global_batch_size
        )
    return Plan(config, recipe, found, rows, _row(config, forecaster, configured), what_ifs, FailureModel())


def _row(config: RunConfig, forecaster: StepForecaster, forecast: StepForecast) -> PlannedLayout:
    phases = estimate_phase_costs(
        forecaster,
        forecast.layout,
        forecast.recipe,
        tokens=config.training.tokens,
        batch_ramp=config.batch_ramp,
        include_published_phases=is_deepseek_v3_run(config),
    )
    return PlannedLayout(forecast, phases)


def _space(config: RunConfig, recipe: ForecastRecipe) -> SearchSpace:
    """Return the search space; what a table of whole phases was measured with stays fixed."""
    cluster = config.cluster
    space = SearchSpace(cluster.total_gpus, cluster.gpus_per_node, precisions=(recipe.precision,))
    if ComputeTimeModel.from_cluster(cluster, recipe).table.measured_recipe:
        return replace(space, recompute_policies=(recipe.recompute,))
    has_both = recipe.precision in (GemmPrecision.FP8, GemmPrecision.BF16) and cluster.peak_fp8_tflops is not None
    return replace(space, precisions=(GemmPrecision.FP8, GemmPrecision.BF16)) if has_both else space


def _refusal(config: RunConfig, sms: int | None, layout: ParallelLayout, recipe: ForecastRecipe) -> str | None:
    """Return why `train` would refuse the run in this layout, in a phrase that is counted; None if it would not."""
    run = config_with_layout(config, layout, recipe)
    problem = next(chain(run.problems(), recipe.problems(sms, layout.topology.ep)), None)
    return None if problem is None else f"{problem.field} ({layout.schedule})"


def plan_as_dict(result: Plan) -> dict[str, object]:
    """Return the plan as plain values, which `shoestring budget --against` reads."""
    found, best = result.search_result, result.best_layout
    gpus = result.config.cluster.total_gpus
    return plan_header() | {
        "run": run_description(result.config),
        "considered": found.considered,
        "illegal": dict(found.illegal),
        "out_of_memory": dict(found.out_of_memory),
        "missing_figures": dict(found.missing_figures),
        "simulated": found.simulated,
        "pruned": found.pruned,
        "smallest_pruned_bound_seconds": found.smallest_pruned_bound,
        "search_seconds": found.search_seconds,
        "layouts": [_row_tree(row, result.config) for row in result.best_layouts],
        "configured": _row_tree(result.configured_layout, result.config),
        "budget_gpu_hours": result.config.budget.gpu_hours,
        "phase_costs": [] if best is None else [phase.__dict__ for phase in best.phase_costs],
        "sensitivity": [{"change": w.name, "step_seconds": w.step_seconds} for w in result.what_ifs],
        "effective_training_share": None if best is None else result.failure_model.effective_training_share(gpus),
        "checkpoint_interval_seconds": None if best is None else result.failure_model.best_checkpoint_interval(gpus),
    }


def _row_tree(row: PlannedLayout, config: RunConfig) -> dict[str, object]:
    extra = {"fits": _fits(row.forecast, config), "overrides": _overrides(row.forecast, config)}
    return layout_as_dict(row.forecast, row.pretraining_gpu_hours) | extra


def write_plan_html(result: Plan, path: Path) -> None:
    """Write the best layout with its timeline and memory as HTML. Raises `ConfigError`."""
    memory = result.config.cluster.memory_gb
    if result.best_layout is None or memory is None:
        raise ConfigError([Problem("--html", str(path), "cannot be written: no layout is legal and fits")])
    forecast = result.best_layout.forecast
    grid = forecast.layout.topology
    title = f"{result.config.model.name}: pp{grid.pp} edp{grid.edp} ep{grid.ep}, {forecast.layout.schedule}"
    try:
        path.write_text(forecast_html(forecast, title, memory))
    except OSError as error:
        raise ConfigError([Problem("--html", str(path), f"cannot be written: {error.strerror}")]) from error


def plan_table(result: Plan) -> RenderableType:
    """Return the plan as tables."""
    parts: list[RenderableType] = [_layouts(result), _counts(result.search_result)]
    if result.best_layout is not None:
        parts += [
            phase_cost_table(result.best_layout.phase_costs, result.config.cluster.price_per_gpu_hour),
            _budget(result),
        ]
        parts += [_sensitivity(result)] if result.what_ifs else []
        parts += [_failures(result), _comparison(result), _how_to_run(result)]
    return Group(*parts)


_COLUMNS = ("", "pp edp ep", "schedule", "micro-\nbatch", "precision", "step, s", "tok/s\n/GPU", "MFU", "peak\nGB")
_TEXT_COLUMNS = ("", "pp edp ep", "schedule", "precision")


def _layouts(result: Plan) -> RenderableType:
    """Return two tables of the same layouts, each at most 80 columns wide."""
    cluster, training = result.config.cluster, result.config.training
    figures, limits = _slim_table(), _slim_table()
    figures.title = (
        f"{result.config.model.name} on {cluster.total_gpus} {cluster.name}, {training.global_batch_size:,} sequences"
    )
    figures.caption = (
        "peak GB: of the rank that needs most, with fragmentation;\n"
        "MFU: main model, causal, without MTP, of the dense BF16 peak."
    )
    for heading in _COLUMNS:
        figures.add_column(heading, justify="left" if heading in _TEXT_COLUMNS else "right", no_wrap=True)
    limits.add_column("")
    limits.add_column("GPU-hours", justify="right", no_wrap=True)
    limits.add_column("recompute", no_wrap=True)
    limits.add_column("bottleneck")
    limits.caption = "current: the layout of the configuration."
    named = [(str(place), row) for place, row in enumerate(result.best_layouts, 1)]
    for name, row in [*named, ("current", result.configured_layout)]:
        forecast = row.forecast
        figures.add_row(name, *_cells(forecast))
        fits = _fits(forecast, result.config)
        limit = forecast.bottleneck if fits else f"memory: does NOT fit into {cluster.memory_gb:g} GB"
        limits.add_row(name, format_significant(row.pretraining_gpu_hours), forecast.recipe.recompute_name, limit)
    return Group(figures, "", limits, "")


def _slim_table() -> Table:
    """Return a table without lines between columns, which would take a third of a narrow terminal."""
    return Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        title_justify="left",
        caption_justify="left",
    )


def _fits(forecast: StepForecast, config: RunConfig) -> bool:
    memory = config.cluster.memory_gb
    return memory is not None and forecast.peak_bytes_with_fragmentation <= memory * 1e9


def _overrides(forecast: StepForecast, config: RunConfig) -> list[str]:
    """Return the overrides to add to the run's to use this layout."""
    return diff_overrides(config, config_with_layout(config, forecast.layout, forecast.recipe))


def _cells(forecast: StepForecast) -> list[str]:
    topology = forecast.layout.topology
    return [
        f"{topology.pp} {topology.edp} {topology.ep}",
        forecast.layout.schedule,
        str(forecast.layout.micro_batch_size),
        forecast.recipe.precision.value,
        f"{forecast.step_seconds:.3f}",
        f"{forecast.tokens_per_second_per_gpu:,.0f}",
        f"{forecast.mfu:.1%}",
        format_giga(forecast.peak_bytes_with_fragmentation, 1),
    ]


def _counts(found: SearchResult) -> Table:
    table = Table(title=f"{found.considered:,} combinations in {found.search_seconds:.1f} s", title_justify="left")
    table.add_column("outcome")
    table.add_column("number", justify="right")
    for reason, count in found.illegal.most_common():
        table.add_row(f"illegal: {reason}", f"{count:,}")
    for reason, count in found.out_of_memory.most_common():
        table.add_row(f"does not fit: {reason}", f"{count:,}")
    for reason, count in found.missing_figures.most_common():
        table.add_row(f"missing figures: {reason}", f"{count:,}")
    rate = found.simulated / found.simulation_cpu_seconds if found.simulation_cpu_seconds else 0.0
    table.add_row(f"simulated, {rate:.0f}/s per core", f"{found.simulated:,}")
    if found.pruned:
        table.add_row(f"pruned: lower bound ≥ {found.smallest_pruned_bound:.3f} s", f"{found.pruned:,}")
    return table


def _budget(result: Plan) -> str:
    assert result.best_layout is not None
    planned, budget = result.best_layout.pretraining_gpu_hours, result.config.budget.gpu_hours
    relation, share = "within" if planned <= budget else "over", format_significant(100 * planned / budget)
    hours = f"{format_significant(planned)} GPU-hours"
    return f"Pre-training: {hours}, {relation} the budget of {format_significant(budget)} ({share} %)."


def _sensitivity(result: Plan) -> Table:
    assert result.best_layout is not None
    table = Table(title="The best layout's step with one input changed", title_justify="left")
    for heading in ("change", "seconds", "relative"):
        table.add_column(heading, justify="left" if heading == "change" else "right")
    for what_if in result.what_ifs:
        table.add_row(
            what_if.name,
            f"{what_if.step_seconds:.3f}",
            f"{what_if.step_seconds / result.best_layout.forecast.step_seconds - 1:+.1%}",
        )
    return table


def _failures(result: Plan) -> str:
    assert result.best_layout is not None
    failures, gpus = result.failure_model, result.best_layout.forecast.gpus
    hours = failures.mean_seconds_between_failures(gpus) / 3600
    blocked, restart = failures.checkpoint_seconds, failures.restart_seconds
    interval, share = failures.best_checkpoint_interval(gpus) / 60, failures.effective_training_share(gpus)
    return (
        f"Failures: one per {hours:.1f} h on {gpus} GPUs (published rate of Llama 3.1's run). With {blocked:g} s per "
        f"checkpoint and {restart:g} s per restart (both assumed), a checkpoint every {interval:.0f} min leaves "
        f"{share:.1%} effective training time."
    )


def _comparison(result: Plan) -> str:
    assert result.best_layout is not None
    best, configured = result.best_layout.forecast, result.configured_layout.forecast
    if not _fits(configured, result.config):
        return "The configured layout does not fit, so there is no comparison."
    if best.step_seconds >= configured.step_seconds:
        return "No searched layout is faster than the configured one."
    gain = 1 - best.step_seconds / configured.step_seconds
    caution = ", which is within the error of a forecast" if gain < _RESOLUTION else ""
    return f"The best layout is {gain:.2%} faster than the configured one{caution}."


def _how_to_run(result: Plan) -> str:
    assert result.best_layout is not None
    overrides = _overrides(result.best_layout.forecast, result.config)
    if not overrides:
        return "The best layout is the configured one."
    return f"To run the best layout, add: {' '.join(overrides)}"
