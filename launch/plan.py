"""`shoestring plan`: layouts searched, and the best of them priced against the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from ..trainer.config import RunConfig
from .compose import compose_run
from .planner.failures import Failures
from .planner.forecast import Forecast, Forecaster
from .planner.phases import PhaseCost, WhatIf, pretraining_hours, run_phases, sensitivity
from .planner.recipe import Precision, Recipe
from .planner.search import SearchResult, Space, illegality, search
from .simulate import default_recipe, layout_of, layout_tree, phase_table, run_facts


@dataclass(frozen=True)
class Row:
    """A layout and what pre-training costs in it."""

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
    rows: tuple[Row, ...]
    """The best layouts that are legal and fit, fastest first."""
    configured: Row | None
    """The layout of the configuration, to compare with; None where it is illegal."""
    what_ifs: list[WhatIf]
    """Of the best layout."""
    failures: Failures

    @property
    def best(self) -> Row | None:
        """The fastest layout that is legal and fits."""
        return self.rows[0] if self.rows else None


def plan(overrides: Sequence[str], config_dir: Path | None, keep: int) -> Plan:
    """Search the layouts of the run that `overrides` describe on all GPUs of its cluster."""
    config = compose_run(overrides, config_dir)
    cluster, training = config.cluster, config.training
    recipe = default_recipe(config)
    forecaster = Forecaster(config.model, cluster, training.sequence_length)
    formats = (Precision.FP8, Precision.BF16) if recipe.precision is Precision.FP8 else (recipe.precision,)
    lent = (20, 6) if recipe.comm_sms else (recipe.comm_sms,)
    space = Space(cluster.gpus, cluster.gpus_per_node, precisions=formats, comm_sms=lent)
    found = search(forecaster, space.candidates(recipe), training.global_batch, keep)

    def row(forecast: Forecast) -> Row:
        size = forecaster, forecast.layout, forecast.recipe
        return Row(forecast, run_phases(*size, tokens=training.tokens, batches=config.batches))

    configured = None
    if illegality(forecaster, layout_of(config), training.global_batch) is None:
        configured = row(forecaster.forecast(layout_of(config), recipe, training.global_batch))
    what_ifs: list[WhatIf] = []
    if found.best:
        what_ifs = sensitivity(forecaster, found.best[0].layout, found.best[0].recipe, training.global_batch)
    return Plan(config, recipe, found, tuple(map(row, found.best)), configured, what_ifs, Failures())


def plan_tree(result: Plan) -> dict[str, object]:
    """The figures as plain values, which `shoestring budget --against` reads."""
    found, best = result.found, result.best
    gpus = result.config.cluster.gpus
    return {
        "of": run_facts(result.config),
        "considered": found.considered,
        "illegal": dict(found.illegal),
        "unfit": dict(found.unfit),
        "simulated": found.simulated,
        "excluded": found.excluded,
        "smallest_excluded_bound_seconds": found.smallest_excluded,
        "search_seconds": found.seconds,
        "layouts": [layout_tree(row.forecast, row.gpu_hours) for row in result.rows],
        "configured": None
        if result.configured is None
        else layout_tree(result.configured.forecast, result.configured.gpu_hours),
        "budget_gpu_hours": result.config.budget.gpu_hours,
        "phases": [] if best is None else [phase.__dict__ for phase in best.phases],
        "sensitivity": [{"what": w.name, "step_seconds": w.seconds} for w in result.what_ifs],
        "effective_training_time": None if best is None else result.failures.effective_share(gpus),
        "checkpoint_interval_seconds": None if best is None else result.failures.best_interval(gpus),
    }


def plan_table(result: Plan) -> RenderableType:
    """The same for a reader."""
    parts: list[RenderableType] = [_layouts(result), _counts(result.found)]
    if result.best is not None:
        parts += [phase_table(result.best.phases, result.config.cluster.price_per_gpu_hour), _budget(result)]
        parts += [_sensitivity(result), _failures(result), _comparison(result)]
    return Group(*parts)


_COLUMNS = ("", "pp edp ep", "schedule", "mb", "recipe", "SMs", "step, s", "tok/s", "MFU", "GB")
_WORDS = ("", "pp edp ep", "schedule", "recipe")


def _layouts(result: Plan) -> RenderableType:
    """Two tables of the same rows, each narrow enough for 80 columns."""
    cluster, training = result.config.cluster, result.config.training
    figures, limits = _slim_table(), _slim_table()
    figures.title = f"{result.config.model.name} on {cluster.gpus} {cluster.name}, {training.global_batch:,} sequences"
    figures.caption = (
        "mb: sequences of a micro-batch; SMs: lent to the exchange; tok/s: of one GPU; GB: of the fullest rank.\n"
        "MFU: main model, causal, without MTP, of the dense BF16 peak."
    )
    for heading in _COLUMNS:
        figures.add_column(heading, justify="left" if heading in _WORDS else "right", no_wrap=True)
    limits.add_column("")
    limits.add_column("GPU-hours", justify="right", no_wrap=True)
    limits.add_column("limited by")
    named = [(str(place), row) for place, row in enumerate(result.rows, 1)]
    for name, row in [*named, *([] if result.configured is None else [("conf", result.configured)])]:
        forecast = row.forecast
        figures.add_row(name, *_cells(forecast))
        fits = cluster.memory_gb is None or forecast.peak_memory.total <= cluster.memory_gb * 1e9
        limit = forecast.limit if fits else f"its memory: does NOT fit into {cluster.memory_gb:g} GB"
        limits.add_row(name, f"{row.gpu_hours:,.0f}", limit)
    if result.configured is not None:
        limits.caption = "conf: the layout of the configuration, to compare with."
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


def _cells(forecast: Forecast) -> list[str]:
    topology, recipe = forecast.layout.topology, forecast.recipe
    return [
        f"{topology.pp} {topology.edp} {topology.ep}",
        forecast.layout.schedule,
        str(forecast.layout.micro_batch),
        f"{recipe.precision} {recipe.recompute}",
        str(recipe.comm_sms),
        f"{forecast.seconds:.3f}",
        f"{forecast.tokens_per_second_and_gpu:,.0f}",
        f"{forecast.mfu:.1%}",
        f"{forecast.peak_memory.total / 1e9:.1f}",
    ]


def _counts(found: SearchResult) -> Table:
    table = Table(title=f"{found.considered:,} combinations in {found.seconds:.1f} s", title_justify="left")
    table.add_column("what became of them")
    table.add_column("number", justify="right")
    for reason, count in found.illegal.most_common():
        table.add_row(f"illegal: {reason}", f"{count:,}")
    for reason, count in found.unfit.most_common():
        table.add_row(f"does not fit: {reason}", f"{count:,}")
    rate = found.simulated / found.simulation_seconds if found.simulation_seconds else 0.0
    table.add_row(f"simulated in full, {rate:.0f} a second and core", f"{found.simulated:,}")
    if found.excluded:
        table.add_row(f"excluded: no order of things is under {found.smallest_excluded:.3f} s", f"{found.excluded:,}")
    return table


def _budget(result: Plan) -> str:
    assert result.best is not None
    planned, budget = result.best.gpu_hours, result.config.budget.gpu_hours
    verdict = "inside" if planned <= budget else "over"
    return f"Pre-training {planned:,.0f} GPU-hours, {verdict} the budget of {budget:,.0f} ({planned / budget:.1%})."


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
    if result.best is None or result.configured is None:
        return "The configured layout is illegal, so there is nothing to compare with."
    best, configured = result.best.forecast, result.configured.forecast
    if best.seconds >= configured.seconds:
        return "No layout of the search beats the configured one."
    gain = 1 - best.seconds / configured.seconds
    lent = f"{best.recipe.comm_sms} SMs lent instead of {configured.recipe.comm_sms}"
    evidence = (
        f" {lent}: published for DeepEP V2 with 32 ranks at the same pace, assumed to hold here."
        if best.recipe.comm_sms != configured.recipe.comm_sms
        else ""
    )
    return f"The best layout is {gain:.1%} faster than the configured one.{evidence}"
