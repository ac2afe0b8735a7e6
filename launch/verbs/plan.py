"""`shoestring plan`: search of the best layouts, with their cost against the budget."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...comm.errors import ConfigError, Problem
from ...comm.units import format_significant
from ...trainer.config import RunConfig
from ..answers.blocks import Answer, Block, HeadlineCard, Paragraph, TableBlock, TableRow, number, table
from ..answers.forecast_blocks import (
    add_input_arguments,
    forecast_figures,
    given_inputs,
    phase_cost_blocks,
    phase_cost_data,
    relative,
    significant,
)
from ..answers.options import add_override_arguments
from ..planner.compute_time import ComputeTimeModel
from ..planner.config_adapter import (
    comm_sms_limit,
    config_with_layout,
    diff_overrides,
)
from ..planner.forecast import ParallelLayout, StepForecast
from ..planner.plan_file import layout_as_dict, plan_header, run_description
from ..planner.recipe import ForecastRecipe, GemmPrecision
from ..planner.run_cost import (
    FailureModel,
    sensitivity_analysis,
)
from ..planner.search import SearchResult, SearchSpace, search_layouts
from .simulate import SimulatedLayout, simulate

_RESOLUTION = 0.01
"""Relative difference below which two forecasts count as equal: they share most of their errors, not all."""
_COUNTS = ("considered", "illegal", "out_of_memory", "missing_figures", "simulated", "pruned", "search_seconds")
_FAILURES = FailureModel()
NO_FORECAST_INPUTS: Mapping[str, Any] = MappingProxyType({})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add_override_arguments(parser)
    parser.add_argument("--keep", type=int, default=5, metavar="N", help="number of layouts to print (default 5)")
    add_input_arguments(parser)


def answer(options: argparse.Namespace) -> Answer:
    """Return the best layouts of the run that the options describe."""
    return plan_answer(plan(options.overrides, options.config_dir, options.keep, given_inputs(options)))


@dataclass(frozen=True)
class Plan:
    """Result of a search."""

    config: RunConfig
    search_result: SearchResult
    best_layouts: tuple[SimulatedLayout, ...]
    """Layouts that are legal and fit, fastest first."""
    configured_layout: SimulatedLayout
    """Layout of the configuration, for comparison."""
    what_ifs: Mapping[str, float]
    """Seconds of the best layout's step by the input that is changed."""

    @property
    def best_layout(self) -> SimulatedLayout | None:
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
    configured = simulate(overrides, config_dir, inputs)
    config, forecaster, recipe = configured.config, configured.forecaster, configured.forecast.recipe
    batch, refusal = configured.global_batch, partial(_refusal, config, comm_sms_limit(config))
    found = search_layouts(forecaster, _space(config, recipe).candidates(recipe), batch, keep, find_refusal=refusal)
    rows = tuple(SimulatedLayout(config, forecaster, forecast) for forecast in found.best_forecasts)
    what_ifs = sensitivity_analysis(forecaster, rows[0].layout, rows[0].forecast.recipe, batch) if rows else {}
    return Plan(config, found, rows, configured, what_ifs)


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


def plan_answer(result: Plan) -> Answer:
    """Return the best layout and its cost, the layouts that come next, and how the search came to them.

    `shoestring budget --against` reads the JSON.
    """
    cluster, best = result.config.cluster, result.best_layout
    batch = f"{result.config.training.global_batch_size:,} sequences"
    title = f"{result.config.model.name} on {cluster.total_gpus} {cluster.name}, {batch}"
    blocks: list[Block] = [*_layouts(result), _counts(result.search_result)]
    if best is None:
        return Answer.from_blocks(title, _data(result), blocks, [HeadlineCard("best layout", "none", note=_NO_LAYOUT)])
    blocks += phase_cost_blocks(best.phase_costs, cluster.price_per_gpu_hour)
    blocks += [_sensitivity(best, result.what_ifs)] if result.what_ifs else []
    blocks += forecast_figures(best.forecast, cluster.memory_gb)
    notes = _failures(best), _comparison(result, best), _how_to_run(result, best)
    blocks += map(Paragraph, notes)
    return Answer.from_blocks(title, _data(result), blocks, list(_cards(best, result.config.budget.gpu_hours)))


_NO_LAYOUT = "no layout is legal and fits"


def _data(result: Plan) -> dict[str, object]:
    found, best = result.search_result, result.best_layout
    gpus = result.config.cluster.total_gpus
    step = None if best is None else best.forecast.step_seconds
    return plan_header() | {
        "run": run_description(result.config),
        **{name: getattr(found, name) for name in _COUNTS},
        "smallest_pruned_bound_seconds": found.smallest_pruned_bound,
        "layouts": [_row_tree(row, result.config) for row in result.best_layouts],
        "configured": _row_tree(result.configured_layout, result.config),
        "budget_gpu_hours": result.config.budget.gpu_hours,
        **phase_cost_data([] if best is None else best.phase_costs, result.config.cluster.price_per_gpu_hour),
        "sensitivity": [
            {"change": change, "step_seconds": seconds, "relative_change": seconds / step - 1}
            for change, seconds in result.what_ifs.items()
            if step is not None
        ],
        "effective_training_share": None if best is None else _FAILURES.effective_training_share(gpus),
        "checkpoint_interval_seconds": None if best is None else _FAILURES.best_checkpoint_interval(gpus),
    }


def _row_tree(row: SimulatedLayout, config: RunConfig) -> dict[str, object]:
    extra = {"fits": _fits(row.forecast, config), "overrides": _overrides(row.forecast, config)}
    return layout_as_dict(row.forecast, row.pretraining_gpu_hours) | extra


def _cards(best: SimulatedLayout, budget: float) -> Iterator[HeadlineCard]:
    forecast, hours = best.forecast, best.pretraining_gpu_hours
    topology, recipe = forecast.layout.topology, forecast.recipe
    how = f"{forecast.layout.schedule}, micro-batch {forecast.layout.micro_batch_size}, {recipe.precision.value}"
    yield HeadlineCard("best layout", f"pp{topology.pp} edp{topology.edp} ep{topology.ep}", note=how)
    rate = f"{forecast.tokens_per_second_per_gpu:,.0f} tokens/s/GPU"
    yield HeadlineCard("step", f"{forecast.step_seconds:.3f}", "s", rate)
    relation, share = "within" if hours <= budget else "over", format_significant(100 * hours / budget)
    note = f"{relation} the budget of {format_significant(budget)}: {share} %"
    yield HeadlineCard("pre-training", format_significant(hours), "GPU-hours", note)


def _layouts(result: Plan) -> Iterator[TableBlock]:
    """Yield two tables of the same layouts, each at most 80 columns wide."""
    named = [(str(place), row) for place, row in enumerate(result.best_layouts, 1)]
    named.append(("current", result.configured_layout))
    columns = ("", "pp edp ep", "schedule", "micro-\nbatch", "precision", "step, s", "tok/s\n/GPU", "MFU", "peak\nGB")
    note = (
        "peak GB: of the rank that needs most, with fragmentation;\n"
        "MFU: main model, causal, without MTP, of the dense BF16 peak."
    )
    yield table("", columns, [_figures(name, row.forecast) for name, row in named], note)
    memory_gb, limits = result.config.cluster.memory_gb, list[TableRow]()
    for name, row in named:
        fits, hours = _fits(row.forecast, result.config), significant(row.pretraining_gpu_hours)
        limit = row.forecast.bottleneck if fits else f"memory: does NOT fit into {memory_gb:g} GB"
        limits.append(TableRow((name, hours, row.forecast.recipe.recompute_name, limit)))
    note = "current: the layout of the configuration."
    yield table("", ("", "GPU-hours", "recompute", "bottleneck"), limits, note)


def _figures(name: str, forecast: StepForecast) -> TableRow:
    topology = forecast.layout.topology
    return TableRow(
        (
            name,
            f"{topology.pp}\u00a0{topology.edp}\u00a0{topology.ep}",  # kept together on a narrow page
            forecast.layout.schedule,
            number(forecast.layout.micro_batch_size),
            forecast.recipe.precision.value,
            number(forecast.step_seconds, ".3f"),
            number(forecast.tokens_per_second_per_gpu, ",.0f"),
            number(forecast.mfu, ".1%"),
            number(forecast.peak_bytes_with_fragmentation, ".1f", scale=1e-9),
        )
    )


def _fits(forecast: StepForecast, config: RunConfig) -> bool:
    memory = config.cluster.memory_gb
    return memory is not None and forecast.peak_bytes_with_fragmentation <= memory * 1e9


def _overrides(forecast: StepForecast, config: RunConfig) -> list[str]:
    """Return the overrides to add to the run's to use this layout."""
    return diff_overrides(config, config_with_layout(config, forecast.layout, forecast.recipe))


def _counts(found: SearchResult) -> TableBlock:
    rate = found.simulated / found.simulation_cpu_seconds if found.simulation_cpu_seconds else 0.0
    outcomes = {f"illegal: {reason}": count for reason, count in found.illegal.most_common()}
    outcomes |= {f"does not fit: {reason}": count for reason, count in found.out_of_memory.most_common()}
    outcomes |= {f"missing figures: {reason}": count for reason, count in found.missing_figures.most_common()}
    outcomes[f"simulated, {rate:.0f}/s per core"] = found.simulated
    if found.pruned:
        outcomes[f"pruned: lower bound ≥ {found.smallest_pruned_bound:.3f} s"] = found.pruned
    title = f"{found.considered:,} combinations in {found.search_seconds:.1f} s"
    return table(title, ("outcome", "number"), [(outcome, number(count)) for outcome, count in outcomes.items()])


def _sensitivity(best: SimulatedLayout, what_ifs: Mapping[str, float]) -> TableBlock:
    rows = [
        (change, number(seconds, ".3f"), relative(seconds, best.forecast.step_seconds))
        for change, seconds in what_ifs.items()
    ]
    return table("The best layout's step with one input changed", ("change", "seconds", "relative"), rows)


def _failures(best: SimulatedLayout) -> str:
    gpus, failures = best.forecast.gpus, _FAILURES
    hours = failures.mean_seconds_between_failures(gpus) / 3600
    blocked, restart = failures.checkpoint_seconds, failures.restart_seconds
    interval, share = failures.best_checkpoint_interval(gpus) / 60, failures.effective_training_share(gpus)
    return (
        f"Failures: one per {hours:.1f} h on {gpus} GPUs (published rate of Llama 3.1's run). With {blocked:g} s per "
        f"checkpoint and {restart:g} s per restart (both assumed), a checkpoint every {interval:.0f} min leaves "
        f"{share:.1%} effective training time."
    )


def _comparison(result: Plan, planned: SimulatedLayout) -> str:
    best, configured = planned.forecast, result.configured_layout.forecast
    if not _fits(configured, result.config):
        return "The configured layout does not fit, so there is no comparison."
    if best.step_seconds >= configured.step_seconds:
        return "No searched layout is faster than the configured one."
    gain = 1 - best.step_seconds / configured.step_seconds
    caution = ", which is within the error of a forecast" if gain < _RESOLUTION else ""
    return f"The best layout is {gain:.2%} faster than the configured one{caution}."


def _how_to_run(result: Plan, best: SimulatedLayout) -> str:
    overrides = _overrides(best.forecast, result.config)
    if not overrides:
        return "The best layout is the configured one."
    return f"To run the best layout, add: {' '.join(overrides)}"
