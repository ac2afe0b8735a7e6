"""`shoestring simulate`: forecast of one layout's step, from kernel and link times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from ... import __version__
from ...comm.errors import ConfigError, Problem
from ...comm.trace import PIPELINE_WAIT
from ...comm.units import format_giga, format_significant
from ...trainer.config import RunConfig
from ...trainer.costs.flops import FLOP_CONVENTION
from ...trainer.ledger.terms import to_label
from ...trainer.memory.peak import MEMORY_LABELS
from ..compose import compose_run_config
from ..planner.config_adapter import layout_from_config, recipe_from_config
from ..planner.evidence import list_assumptions
from ..planner.forecast import ParallelLayout, StepForecast, StepForecaster
from ..planner.published import (
    PUBLISHED_INITIAL_BATCH,
    PUBLISHED_PHASE_SECONDS,
    PUBLISHED_STEP_SECONDS,
    TRACED_CHUNK_PAIR_SECONDS,
    exposed_communication_share,
    is_deepseek_v3_layout,
    is_deepseek_v3_run,
    seconds_by_published_phase,
    simulate_traced_chunk_pair,
)
from ..planner.recipe import RECOMPUTE_DEEPSEEK_V3, RECOMPUTE_NOTHING, ForecastRecipe, PeerWaits
from ..planner.run_cost import (
    RunPhaseCost,
    batch_size_problem,
    estimate_phase_costs,
    pretraining_gpu_hours,
)
from ..planner.simulated_trace import write_simulated_trace
from ..report.forecast_page import forecast_html


@dataclass(frozen=True)
class SimulatedLayout:
    """One layout with its forecast."""

    config: RunConfig
    forecaster: StepForecaster
    forecast: StepForecast

    @property
    def layout(self) -> ParallelLayout:
        """Layout of the configuration."""
        return self.forecast.layout

    @property
    def global_batch(self) -> int:
        """Sequences per step."""
        return self.config.training.global_batch_size

    def forecast_with(self, recipe: ForecastRecipe) -> StepForecast:
        """Forecast the same layout with another recipe."""
        return self.forecaster.forecast(self.layout, recipe, self.global_batch)

    @property
    def is_deepseek_v3_layout(self) -> bool:
        """True if DeepSeek's published figures are of this layout."""
        return is_deepseek_v3_layout(self.config, self.layout, self.forecast.recipe)

    def phase_costs(self) -> list[RunPhaseCost]:
        """Estimate the cost of each phase of the run."""
        return estimate_phase_costs(
            self.forecaster,
            self.layout,
            self.forecast.recipe,
            tokens=self.config.training.tokens,
            batch_ramp=self.config.batch_ramp,
            include_published_phases=is_deepseek_v3_run(self.config),
        )


def simulate(overrides: Sequence[str], config_dir: Path | None, inputs: Mapping[str, Any]) -> SimulatedLayout:
    """Simulate the run that `overrides` describe; `inputs` are recipe fields that no configuration has."""
    config = compose_run_config(overrides, config_dir)
    recipe = recipe_from_config(config, inputs)
    forecaster = StepForecaster(config.model, config.cluster, config.training.sequence_length)
    return SimulatedLayout(
        config, forecaster, forecaster.forecast(layout_from_config(config), recipe, config.training.global_batch_size)
    )


def write_trace_and_html(simulation: SimulatedLayout, trace: Path | None, page: Path | None) -> None:
    """Write the Perfetto trace and the HTML page to the given paths, if any. Raises `ConfigError`."""
    try:
        if trace is not None:
            costs = simulation.forecaster.chunk_time_model(simulation.layout, simulation.forecast.recipe)
            write_simulated_trace(trace, simulation.forecast, costs)
        if page is not None:
            memory = simulation.config.cluster.memory_gb
            assert memory is not None
            page.write_text(forecast_html(simulation.forecast, _title(simulation), memory))
    except OSError as error:
        raise ConfigError(
            [Problem("--trace, --html", str(error.filename), f"cannot be written: {error.strerror}")]
        ) from None


def simulation_as_dict(simulation: SimulatedLayout) -> dict[str, object]:
    """Return the whole simulation as plain values."""
    forecast, cluster = simulation.forecast, simulation.config.cluster
    phases = simulation.phase_costs()
    return plan_header() | {
        "run": run_description(simulation.config),
        "layout": layout_as_dict(forecast, pretraining_gpu_hours(phases)),
        "flops_per_token": forecast.flops_per_token.main_model,
        "convention": FLOP_CONVENTION,
        "time_terms_by_rank": list(forecast.time_terms_by_rank),
        "deepseek_report_terms": forecast.deepseek_report_terms(),
        "memory_by_rank": [memory.__dict__ | {"total": memory.total} for memory in forecast.memory_by_rank],
        "memory_limit_bytes": None if cluster.memory_gb is None else cluster.memory_gb * 1e9,
        "p2p_seconds": forecast.p2p_seconds,
        "evidence_shares": forecast.evidence_coverage.evidence_shares(),
        "substituted_rows": forecast.evidence_coverage.substituted_rows,
        "assumptions": [list(row) for row in _assumptions(simulation)],
        "published_step_errors": (
            [list(row) for row in published_step_errors(simulation)] if simulation.is_deepseek_v3_layout else []
        ),
        "phase_costs": [phase.__dict__ for phase in phases],
    }


PLAN_FORMAT = 2
"""Number in the JSON of `simulate` and `plan`; without it, the format is 1, whose keys had other names."""


def plan_header() -> dict[str, object]:
    """Return the first keys of the JSON of `simulate` and `plan`: its format, and the version that writes it."""
    return {"format": PLAN_FORMAT, "version": __version__}


def run_description(config: RunConfig) -> dict[str, object]:
    """Return what determines the price of a run besides the layout."""
    names = (
        "sequence_length",
        "global_batch_size",
        "rampup_start_batch_size",
        "rampup_batch_size_increment",
        "rampup_tokens",
        "tokens",
    )
    training = {name: config.training.__dict__[name] for name in names}
    return {"model": asdict(config.model), **training, "cluster": config.cluster.name}


def layout_as_dict(forecast: StepForecast, gpu_hours: float) -> dict[str, object]:
    """Return a layout and its forecast as plain values; `gpu_hours` are of pre-training, terms are means over ranks."""
    topology, recipe = forecast.layout.topology, forecast.recipe
    return {
        "pp": topology.pp,
        "edp": topology.edp,
        "ep": topology.ep,
        "schedule": forecast.layout.schedule,
        "micro_batch": forecast.layout.micro_batch_size,
        "layers_per_stage": [stage.dense_layers + stage.moe_layers for stage in forecast.stage_shapes],
        "precision": recipe.precision.value,
        "recompute": sorted(recipe.recompute),
        "exchange": recipe.exchange_name,
        "overlap": recipe.overlap,
        "moment_bytes": recipe.moment_bytes,
        "comm_sms": recipe.comm_sms,
        "step_seconds": forecast.step_seconds,
        "tokens_per_second_per_gpu": forecast.tokens_per_second_per_gpu,
        "mfu": forecast.mfu,
        "memory_bytes": forecast.peak_memory.total,
        "memory_bytes_with_fragmentation": forecast.peak_bytes_with_fragmentation,
        "gpu_hours": gpu_hours,
        "time_terms": forecast.mean_time_terms,
        "bottleneck": forecast.bottleneck,
    }


def published_step_errors(simulation: SimulatedLayout) -> list[tuple[str, float, float]]:
    """Return (scenario, seconds, error): the forecast without and with pipeline sends and uneven stages, then what-ifs.

    Several what-ifs explain about as much of the error. Nothing published tells which is true, and none is in the
    forecast.
    """
    base = simulation.forecast.recipe
    known = {
        "ideal": replace(base, uneven_stages=False, p2p_takes_time=False),
        "+ pipeline sends": replace(base, uneven_stages=False),
        "+ uneven stages": replace(base, p2p_takes_time=False),
        "+ both = forecast": base,
    }
    ends, middle = ((0, 1.08), (-1, 1.08)), ((7, 1.08),)
    what_ifs = {
        "first and last rank 8 % slower": replace(base, slowdown_by_pp_rank=ends),
        "one middle rank 8 % slower": replace(base, slowdown_by_pp_rank=middle),
        "pipeline sends of 8.5 ms": replace(base, p2p_seconds=8.5e-3),
        "node speed varies by 1.4 %": replace(base, jitter=0.014),
        "waiting inside all all-to-alls as in the trace": replace(base, peer_waits=PeerWaits.EVERYWHERE),
        "no waiting inside all-to-alls": replace(base, peer_waits=PeerWaits.NONE),
    }
    rows = [*known.items(), *((f"what-if: {name}", recipe) for name, recipe in what_ifs.items())]
    seconds = [(name, simulation.forecast_with(recipe).step_seconds) for name, recipe in rows]
    return [(name, value, value / PUBLISHED_STEP_SECONDS - 1) for name, value in seconds]


def simulation_table(simulation: SimulatedLayout) -> RenderableType:
    """Return the simulation as tables."""
    parts: list[RenderableType] = [_figures(simulation), _terms(simulation), _memory(simulation)]
    if simulation.is_deepseek_v3_layout:
        parts += [_published_phases(simulation), _pair(simulation), _errors(simulation)]
    parts += [
        phase_cost_table(simulation.phase_costs(), simulation.config.cluster.price_per_gpu_hour),
        _evidence(simulation),
    ]
    return Group(*parts, f"Convention: {FLOP_CONVENTION}.")


def _title(simulation: SimulatedLayout) -> str:
    topology, layout = simulation.layout.topology, simulation.layout
    grid = f"pp{topology.pp} edp{topology.edp} ep{topology.ep}"
    names = f"{simulation.config.model.name} on {topology.world_size} {simulation.config.cluster.name}"
    return f"{names}: {grid}, {layout.schedule}"


def _figures(simulation: SimulatedLayout) -> Table:
    forecast, cluster = simulation.forecast, simulation.config.cluster
    table = Table(title=_title(simulation), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row(
        "step",
        f"{forecast.step_seconds:.3f} s" if forecast.step_seconds > 0.1 else f"{forecast.step_seconds * 1e3:.2f} ms",
    )
    table.add_row("tokens/s/GPU", f"{forecast.tokens_per_second_per_gpu:,.0f}")
    table.add_row("FLOPs per token", f"{forecast.flops_per_token.main_model / 1e9:.4g} G")
    table.add_row(
        "MFU, main model, causal, without MTP", f"{forecast.mfu:.2%} of {forecast.peak_flops_per_gpu / 1e12:.4g} TFLOPS"
    )
    if cluster.memory_gb is not None:
        peak, needed = forecast.peak_memory.total / 1e9, forecast.peak_bytes_with_fragmentation / 1e9
        result = "fits" if needed <= cluster.memory_gb else "does NOT fit"
        sizes = f"{peak:.1f} GB, {needed:.1f} with fragmentation, of {cluster.memory_gb:g}"
        table.add_row("peak memory per rank", f"{sizes}: {result}")
    for name, value in _recipe_rows(forecast.recipe):
        table.add_row(name, value)
    table.add_row("bottleneck", forecast.bottleneck)
    ramp = simulation.config.training.rampup_start_batch_size
    if simulation.is_deepseek_v3_layout and ramp is not None and ramp != PUBLISHED_INITIAL_BATCH:
        deviation = f"ramp from {ramp:,} sequences: {_ramp_reason(simulation)}"
        table.add_row("differs from published run", deviation)
    return table


def _recipe_rows(recipe: ForecastRecipe) -> list[tuple[str, str]]:
    """Return the rows about precision, recompute and token dispatcher."""
    overlap = "" if recipe.overlap else ", no overlap in FB"
    sms = f", {recipe.comm_sms} SMs reserved for communication" if recipe.comm_sms else ""
    memory = f"recompute {recipe.recompute_name}, optimizer state {recipe.moment_bytes} bytes/param"
    return [
        ("precision, recompute", f"{recipe.precision}, {memory}"),
        ("token dispatcher", f"{recipe.exchange_name}{sms}{overlap}"),
    ]


def _ramp_reason(simulation: SimulatedLayout) -> str:
    """Return why the published start of the ramp is illegal in this layout."""
    problem = batch_size_problem(simulation.layout, PUBLISHED_INITIAL_BATCH)
    return problem or f"the published {PUBLISHED_INITIAL_BATCH:,} are legal in this layout"


def _terms(simulation: SimulatedLayout) -> Table:
    """Return the time terms of the ledger, and the two parts of pipeline wait."""
    forecast = simulation.forecast
    table = Table(title="Where a step goes, mean over ranks", title_justify="left")
    for heading in ("term", "seconds", "share"):
        table.add_column(heading, justify="left" if heading == "term" else "right")
    # Without the names of DeepSeek's report: `_published_phases` prints those, with all-to-alls inside.
    waits = {
        "pipeline wait of the ideal schedule": forecast.bubble_seconds,
        "pipeline wait from imbalance": forecast.mean_time_terms[PIPELINE_WAIT] - forecast.bubble_seconds,
    }
    for terms in (forecast.mean_time_terms, waits):
        for name, seconds in terms.items():
            table.add_row(to_label(name), f"{seconds:.4g}", f"{seconds / forecast.step_seconds:.1%}")
        table.add_section()
    return table


def _published_phases(simulation: SimulatedLayout) -> Table:
    table = Table(
        title="The step in the phases of the published table",
        caption="1F to 1F1B include exposed all-to-alls;\nbubble: all waiting for other stages;\n"
        "opt: gradient sums and optimizer.",
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("phase", "seconds", "published", "error"):
        table.add_column(heading, justify="left" if heading == "phase" else "right")
    for name, seconds in seconds_by_published_phase(simulation.forecast).items():
        table.add_row(
            name,
            f"{seconds:.4g}",
            f"{PUBLISHED_PHASE_SECONDS[name]:.2f}",
            f"{seconds / PUBLISHED_PHASE_SECONDS[name] - 1:+.1%}",
        )
    return table


def _memory(simulation: SimulatedLayout) -> Table:
    table = Table(title="Memory of the rank that needs most", title_justify="left")
    table.add_column("part")
    table.add_column("GB", justify="right")
    peak = simulation.forecast.peak_memory
    for name, size in peak.__dict__.items():
        table.add_row(MEMORY_LABELS[name], format_giga(size))
    table.add_section()
    table.add_row("total", format_giga(peak.total))
    if simulation.forecast.recipe.recompute == RECOMPUTE_DEEPSEEK_V3:
        without = simulation.forecast_with(replace(simulation.forecast.recipe, recompute=RECOMPUTE_NOTHING))
        table.add_row("without DeepSeek's memory savings (no recompute)", format_giga(without.peak_memory.total))
    return table


def _pair(simulation: SimulatedLayout) -> Table:
    costs = simulation.forecaster.chunk_time_model(simulation.layout, simulation.forecast.recipe)
    # The kernel times come from this trace, so this checks the simulation of streams and predicts nothing.
    title = "Consistency check: the overlapped pair of four MoE layers, simulated with the public trace's kernel times"
    table = Table(title=title, title_justify="left")
    for heading in ("tokens per expert", "ms", "error vs. 129.0 ms trace", "exposed communication", "traced"):
        table.add_column(heading, justify="left" if heading.startswith("tokens") else "right")
    for name, use_traced_rows in (("as in the trace", True), ("balanced", False)):
        streams = simulate_traced_chunk_pair(costs, use_traced_rows=use_traced_rows)
        error = streams.elapsed_seconds / TRACED_CHUNK_PAIR_SECONDS - 1
        table.add_row(
            name,
            f"{streams.elapsed_seconds * 1e3:.1f}",
            f"{error:+.1%}",
            f"{exposed_communication_share(streams):.1%}",
            "3.3%",
        )
    return table


def _errors(simulation: SimulatedLayout) -> Table:
    title = f"Error against the published step of {PUBLISHED_STEP_SECONDS} s (not fitted)"
    table = Table(title=title, title_justify="left")
    for heading in ("scenario", "seconds", "error"):
        table.add_column(heading, justify="left" if heading == "scenario" else "right")
    for name, seconds, error in published_step_errors(simulation):
        table.add_row(name, f"{seconds:.3f}", f"{error:+.1%}", end_section=name == "+ both = forecast")
    return table


def phase_cost_table(phases: Sequence[RunPhaseCost], price: float | None) -> RenderableType:
    """Return the table of phases in GPU-hours, and USD if there is a price; notes on phases follow it."""
    table = Table(title="The whole run", title_justify="left")
    for heading in ("phase", "GPU-hours", "USD", "evidence"):
        table.add_column(heading, justify="right" if heading in ("GPU-hours", "USD") else "left")
    notes = Table.grid(padding=(0, 2))
    total = RunPhaseCost("total", sum(phase.gpu_hours for phase in phases), "")
    for phase in (*phases, total):
        dollars = "-" if price is None else format_significant(phase.gpu_hours * price)
        table.add_row(
            phase.name, format_significant(phase.gpu_hours), dollars, phase.evidence, end_section=phase is phases[-1]
        )
        if phase.note:
            notes.add_row(phase.name, phase.note.replace("; ", "\n"))
    return Group(table, notes, "")


def _assumptions(simulation: SimulatedLayout) -> list[tuple[str, str, str]]:
    costs = simulation.forecaster.chunk_time_model(simulation.layout, simulation.forecast.recipe)
    return list_assumptions(simulation.config, simulation.forecast, costs)


def _evidence(simulation: SimulatedLayout) -> RenderableType:
    coverage = simulation.forecast.evidence_coverage
    shares = ", ".join(f"{name} {share:.0%}" for name, share in coverage.evidence_shares().items())
    table = Table(title=f"Evidence, by time of distinct operations: {shares}", title_justify="left")
    for heading in ("assumption", "evidence", "source"):
        table.add_column(heading)
    for row in _assumptions(simulation):
        table.add_row(*row)
    substituted = Table(title=f"{len(coverage.substituted_rows)} shapes without a measured row", title_justify="left")
    substituted.add_column("operation")
    substituted.add_column("estimated from")
    for operation, taken in coverage.substituted_rows.items():
        substituted.add_row(operation, taken)
    return Group(table, substituted) if coverage.substituted_rows else table
