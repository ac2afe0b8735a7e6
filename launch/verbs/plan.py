"""`shoestring plan`: layouts searched, and the best of them priced against the budget."""

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
from ...trainer.config import RunConfig
from ..compose import compose_run
from ..planner.configured import layout_of, lendable_sms, overrides_between, recipe_of, run_with
from ..planner.forecast import Forecast, Forecaster, Layout
from ..planner.pricing import Compute
from ..planner.published import is_published_run
from ..planner.recipe import Precision, Recipe
from ..planner.run_cost import Failures, PhaseCost, WhatIf, pretraining_hours, run_phases, sensitivity, significant
from ..planner.search import SearchResult, SearchSpace, search
from ..report.plan_page import html_page
from .simulate import layout_tree, phase_table, run_facts

_TELLS_APART = 0.01
"""Two forecasts share most of their errors, but not all: within this they are the same."""
NO_INPUTS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class PlannedLayout:
    """A layout and what the run costs in it."""

    forecast: Forecast
    phases: list[PhaseCost]

    @property
    def gpu_hours(self) -> float:
        """Of pre-training, the ramp included."""
        return pretraining_hours(self.phases)


@dataclass(frozen=True)
class Plan:
    """What a search has found."""

    config: RunConfig
    recipe: Recipe
    found: SearchResult
    rows: tuple[PlannedLayout, ...]
    """The best layouts that are legal and fit, fastest first."""
    configured: PlannedLayout
    """The layout of the configuration, to compare with."""
    what_ifs: list[WhatIf]
    """Of the best layout."""
    failures: Failures

    @property
    def best(self) -> PlannedLayout | None:
        """The fastest layout that is legal and fits."""
        return self.rows[0] if self.rows else None


def plan(overrides: Sequence[str], config_dir: Path | None, keep: int, inputs: Mapping[str, Any] = NO_INPUTS) -> Plan:
    """Search the layouts of the run that `overrides` describe on all GPUs of its cluster.

    `inputs` are fields of the recipe that no configuration has. Raises `ConfigError`.
    """
    if keep < 1:
        raise ConfigError([Problem("--keep", keep, "must be at least 1")])
    config = compose_run(overrides, config_dir)
    training, recipe = config.training, recipe_of(config, inputs)
    forecaster = Forecaster(config.model, config.cluster, training.sequence_length)
    configured = forecaster.forecast(layout_of(config), recipe, training.global_batch)
    candidates = _space(config, recipe).candidates(recipe)
    refusal = partial(_refusal, config, lendable_sms(config))
    found = search(forecaster, candidates, training.global_batch, keep, refusal=refusal)
    rows = tuple(_row(config, forecaster, forecast) for forecast in found.best)
    what_ifs: list[WhatIf] = []
    if found.best:
        what_ifs = sensitivity(forecaster, found.best[0].layout, found.best[0].recipe, training.global_batch)
    return Plan(config, recipe, found, rows, _row(config, forecaster, configured), what_ifs, Failures())


def _row(config: RunConfig, forecaster: Forecaster, forecast: Forecast) -> PlannedLayout:
    phases = run_phases(
        forecaster,
        forecast.layout,
        forecast.recipe,
        tokens=config.training.tokens,
        batches=config.batches,
        published=is_published_run(config),
    )
    return PlannedLayout(forecast, phases)


def _space(config: RunConfig, recipe: Recipe) -> SearchSpace:
    """Held fixed is what the table was measured with, and a format that the run does not compute in anyway."""
    cluster = config.cluster
    space = SearchSpace(cluster.gpus, cluster.gpus_per_node, precisions=(recipe.precision,))
    if Compute.of(cluster, recipe).table.measured_with:
        return replace(space, recomputes=(recipe.recompute,))
    has_both = recipe.precision in (Precision.FP8, Precision.BF16) and cluster.peak_fp8_tflops is not None
    return replace(space, precisions=(Precision.FP8, Precision.BF16)) if has_both else space


def _refusal(config: RunConfig, sms: int | None, layout: Layout, recipe: Recipe) -> str | None:
    """Why `train` would refuse the run in another layout, in a few words that many share; None where it would not."""
    run, own = run_with(config, layout, recipe), recipe.problems(sms, layout.topology.ep)
    problem = next(chain(run.problems(), own), None)
    return None if problem is None else f"{problem.field} ({layout.schedule})"


def plan_tree(result: Plan) -> dict[str, object]:
    """The figures as plain values, which `shoestring budget --against` reads."""
    found, best = result.found, result.best
    gpus = result.config.cluster.gpus
    return {
        "of": run_facts(result.config),
        "considered": found.considered,
        "illegal": dict(found.illegal),
        "unfit": dict(found.unfit),
        "unpriced": dict(found.unpriced),
        "simulated": found.simulated,
        "excluded": found.excluded,
        "smallest_excluded_bound_seconds": found.smallest_excluded,
        "search_seconds": found.seconds,
        "layouts": [_row_tree(row, result.config) for row in result.rows],
        "configured": _row_tree(result.configured, result.config),
        "budget_gpu_hours": result.config.budget.gpu_hours,
        "phases": [] if best is None else [phase.__dict__ for phase in best.phases],
        "sensitivity": [{"what": w.name, "step_seconds": w.seconds} for w in result.what_ifs],
        "effective_training_time": None if best is None else result.failures.effective_share(gpus),
        "checkpoint_interval_seconds": None if best is None else result.failures.best_interval(gpus),
    }


def _row_tree(row: PlannedLayout, config: RunConfig) -> dict[str, object]:
    own = {"fits": _fits(row.forecast, config), "overrides": _overrides(row.forecast, config)}
    return layout_tree(row.forecast, row.gpu_hours) | own


def write_page(result: Plan, path: Path) -> None:
    """The best layout with its timeline and memory, as HTML. Raises `ConfigError`."""
    memory = result.config.cluster.memory_gb
    if result.best is None or memory is None:
        raise ConfigError([Problem("--html", str(path), "there is nothing to draw: no layout is legal and fits")])
    forecast = result.best.forecast
    grid = forecast.layout.topology
    title = f"{result.config.model.name}: pp{grid.pp} edp{grid.edp} ep{grid.ep}, {forecast.layout.schedule}"
    try:
        path.write_text(html_page(forecast, title, memory))
    except OSError as error:
        raise ConfigError([Problem("--html", str(path), f"cannot be written: {error.strerror}")]) from error


def plan_table(result: Plan) -> RenderableType:
    """The same for a reader."""
    parts: list[RenderableType] = [_layouts(result), _counts(result.found)]
    if result.best is not None:
        parts += [phase_table(result.best.phases, result.config.cluster.price_per_gpu_hour), _budget(result)]
        parts += [_sensitivity(result)] if result.what_ifs else []
        parts += [_failures(result), _comparison(result), _how_to_run(result)]
    return Group(*parts)


_COLUMNS = ("", "pp edp ep", "schedule", "mb", "GEMMs", "step, s", "tok/s", "MFU", "GB")
_WORDS = ("", "pp edp ep", "schedule", "GEMMs")


def _layouts(result: Plan) -> RenderableType:
    """Two tables of the same rows, each narrow enough for 80 columns."""
    cluster, training = result.config.cluster, result.config.training
    figures, limits = _slim_table(), _slim_table()
    figures.title = f"{result.config.model.name} on {cluster.gpus} {cluster.name}, {training.global_batch:,} sequences"
    figures.caption = (
        "mb: sequences of a micro-batch; tok/s: of one GPU; GB: of the\n"
        "fullest rank, fragmentation included; MFU: main model, causal,\n"
        "without MTP, of the dense BF16 peak."
    )
    for heading in _COLUMNS:
        figures.add_column(heading, justify="left" if heading in _WORDS else "right", no_wrap=True)
    limits.add_column("")
    limits.add_column("GPU-hours", justify="right", no_wrap=True)
    limits.add_column("recompute", no_wrap=True)
    limits.add_column("limited by")
    limits.caption = "conf: the layout of the configuration, to compare with."
    named = [(str(place), row) for place, row in enumerate(result.rows, 1)]
    for name, row in [*named, ("conf", result.configured)]:
        forecast = row.forecast
        figures.add_row(name, *_cells(forecast))
        fits = _fits(forecast, result.config)
        limit = forecast.limit if fits else f"its memory: does NOT fit into {cluster.memory_gb:g} GB"
        limits.add_row(name, significant(row.gpu_hours), forecast.recipe.recompute_name, limit)
    return Group(figures, "", limits, "")


def _slim_table() -> Table:
    """Without lines between columns, which would take a third of a narrow terminal."""
    return Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        title_justify="left",
        caption_justify="left",
    )


def _fits(forecast: Forecast, config: RunConfig) -> bool:
    memory = config.cluster.memory_gb
    return memory is not None and forecast.needed_memory <= memory * 1e9


def _overrides(forecast: Forecast, config: RunConfig) -> list[str]:
    """What to write behind the run's overrides to run it so."""
    return overrides_between(config, run_with(config, forecast.layout, forecast.recipe))


def _cells(forecast: Forecast) -> list[str]:
    topology = forecast.layout.topology
    return [
        f"{topology.pp} {topology.edp} {topology.ep}",
        forecast.layout.schedule,
        str(forecast.layout.micro_batch),
        forecast.recipe.precision.value,
        f"{forecast.seconds:.3f}",
        f"{forecast.tokens_per_second_and_gpu:,.0f}",
        f"{forecast.mfu:.1%}",
        f"{forecast.needed_memory / 1e9:.1f}",
    ]


def _counts(found: SearchResult) -> Table:
    table = Table(title=f"{found.considered:,} combinations in {found.seconds:.1f} s", title_justify="left")
    table.add_column("what became of them")
    table.add_column("number", justify="right")
    for reason, count in found.illegal.most_common():
        table.add_row(f"illegal: {reason}", f"{count:,}")
    for reason, count in found.unfit.most_common():
        table.add_row(f"does not fit: {reason}", f"{count:,}")
    for reason, count in found.unpriced.most_common():
        table.add_row(f"no price: {reason}", f"{count:,}")
    rate = found.simulated / found.simulation_seconds if found.simulation_seconds else 0.0
    table.add_row(f"simulated in full, {rate:.0f} a second and core", f"{found.simulated:,}")
    if found.excluded:
        table.add_row(f"excluded: no order of things is under {found.smallest_excluded:.3f} s", f"{found.excluded:,}")
    return table


def _budget(result: Plan) -> str:
    assert result.best is not None
    planned, budget = result.best.gpu_hours, result.config.budget.gpu_hours
    verdict, share = "inside" if planned <= budget else "over", significant(100 * planned / budget)
    hours = f"{significant(planned)} GPU-hours"
    return f"Pre-training {hours}, {verdict} the budget of {significant(budget)} ({share} %)."


def _sensitivity(result: Plan) -> Table:
    assert result.best is not None
    table = Table(title="What a change would do to the best layout's step", title_justify="left")
    for heading in ("change", "seconds", "of the step"):
        table.add_column(heading, justify="left" if heading == "change" else "right")
    for what_if in result.what_ifs:
        table.add_row(
            what_if.name, f"{what_if.seconds:.3f}", f"{what_if.seconds / result.best.forecast.seconds - 1:+.1%}"
        )
    return table


def _failures(result: Plan) -> str:
    assert result.best is not None
    failures, gpus = result.failures, result.best.forecast.gpus
    hours = failures.mean_seconds_between(gpus) / 3600
    blocked, restart = failures.checkpoint_seconds, failures.restart_seconds
    interval, share = failures.best_interval(gpus) / 60, failures.effective_share(gpus)
    return (
        f"Failures: one in {hours:.1f} h on {gpus} GPUs (published rate of Llama 3.1's run). With checkpoints that "
        f"block {blocked:g} s and restarts of {restart:g} s (both assumed), a checkpoint every {interval:.0f} min "
        f"leaves {share:.1%} effective training time."
    )


def _comparison(result: Plan) -> str:
    assert result.best is not None
    best, configured = result.best.forecast, result.configured.forecast
    if not _fits(configured, result.config):
        return "The configured layout does not fit, so there is nothing to compare with."
    if best.seconds >= configured.seconds:
        return "No layout of the search beats the configured one."
    gain = 1 - best.seconds / configured.seconds
    doubt = ", which is less than a forecast can tell apart" if gain < _TELLS_APART else ""
    return f"The best layout is {gain:.2%} faster than the configured one{doubt}."


def _how_to_run(result: Plan) -> str:
    assert result.best is not None
    overrides = _overrides(result.best.forecast, result.config)
    if not overrides:
        return "The best layout is the configured one."
    return f"To run the best layout, add: {' '.join(overrides)}"
