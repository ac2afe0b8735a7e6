"""`shoestring simulate`: forecast of one layout's step, from kernel and link times."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...comm.trace import PIPELINE_WAIT
from ...comm.units import format_significant
from ...trainer.config import RunConfig
from ...trainer.costs.flops import FLOP_CONVENTION
from ...trainer.ledger.terms import to_label
from ...trainer.memory.peak import memory_label
from ..answers.blocks import (
    Answer,
    Block,
    Cell,
    Formats,
    HeadlineCard,
    Paragraph,
    Quantity,
    TableBlock,
    TableRow,
    number,
    records_table,
    table,
)
from ..answers.forecast_blocks import (
    add_input_arguments,
    forecast_figures,
    given_inputs,
    phase_cost_blocks,
    phase_cost_data,
)
from ..answers.options import add_override_arguments, write_output
from ..compose import compose_run_config
from ..planner.config_adapter import layout_from_config, recipe_from_config
from ..planner.evidence import Assumption, list_assumptions
from ..planner.forecast import ParallelLayout, StepForecast, StepForecaster
from ..planner.layout_memory import memory_by_kind
from ..planner.plan_file import layout_as_dict, plan_header, run_description
from ..planner.published import (
    PUBLISHED_INITIAL_BATCH,
    PUBLISHED_PHASE_SECONDS,
    PUBLISHED_STEP_SECONDS,
    TRACED_CHUNK_PAIR_SECONDS,
    TRACED_EXPOSED_SHARE,
    exposed_communication_share,
    is_deepseek_v3_layout,
    seconds_by_published_phase,
    simulate_traced_chunk_pair,
)
from ..planner.recipe import RECOMPUTE_DEEPSEEK_V3, RECOMPUTE_NOTHING, ForecastRecipe, PeerWaits
from ..planner.run_cost import (
    RunPhaseCost,
    batch_size_problem,
    pretraining_gpu_hours,
    run_phase_costs,
)
from ..planner.simulated_trace import simulated_trace

_FORECAST = "+ both = forecast"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add_override_arguments(parser)
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write the simulated timeline for Perfetto")
    add_input_arguments(parser)


def answer(options: argparse.Namespace) -> Answer:
    """Return the forecast of the run that the options describe, and write its timeline for --trace."""
    simulation = simulate(options.overrides, options.config_dir, given_inputs(options))
    if options.trace is not None:
        costs = simulation.forecaster.chunk_time_model(simulation.layout, simulation.forecast.recipe)
        write_output(options.trace, simulated_trace(simulation.forecast, costs), "--trace")
    return simulation_answer(simulation)


@dataclass(frozen=True)
class SimulatedLayout:
    """One layout of a run with its forecast."""

    config: RunConfig
    forecaster: StepForecaster
    forecast: StepForecast

    @property
    def layout(self) -> ParallelLayout:
        """The layout."""
        return self.forecast.layout

    @property
    def global_batch(self) -> int:
        """Sequences per step."""
        return self.config.training.global_batch_size

    def forecast_with(self, recipe: ForecastRecipe) -> StepForecast:
        """Forecast the same layout with another recipe."""
        return self.forecaster.forecast(self.layout, recipe, self.global_batch)

    @cached_property
    def peak_bytes_without_recompute(self) -> float | None:
        """Bytes of the rank that needs most, without DeepSeek's memory savings; None for a run without them."""
        if self.forecast.recipe.recompute != RECOMPUTE_DEEPSEEK_V3:
            return None
        return self.forecast_with(replace(self.forecast.recipe, recompute=RECOMPUTE_NOTHING)).peak_memory.total

    @cached_property
    def assumptions(self) -> list[Assumption]:
        """Assumptions of the forecast."""
        costs = self.forecaster.chunk_time_model(self.layout, self.forecast.recipe)
        return list_assumptions(self.config, self.forecast, costs)

    @property
    def is_deepseek_v3_layout(self) -> bool:
        """True if DeepSeek's published figures are of this layout."""
        return is_deepseek_v3_layout(self.config, self.layout, self.forecast.recipe)

    @cached_property
    def phase_costs(self) -> list[RunPhaseCost]:
        """Cost of each phase of the run."""
        return run_phase_costs(self.config, self.forecaster, self.forecast)

    @property
    def pretraining_gpu_hours(self) -> float:
        """GPU-hours of pre-training, batch ramp included."""
        return pretraining_gpu_hours(self.phase_costs)


def simulate(overrides: Sequence[str], config_dir: Path | None, inputs: Mapping[str, Any]) -> SimulatedLayout:
    """Simulate the run that `overrides` describe; `inputs` are recipe fields that no configuration has."""
    config = compose_run_config(overrides, config_dir)
    recipe = recipe_from_config(config, inputs)
    forecaster = StepForecaster(config.model, config.cluster, config.training.sequence_length)
    return SimulatedLayout(
        config, forecaster, forecaster.forecast(layout_from_config(config), recipe, config.training.global_batch_size)
    )


def simulation_answer(simulation: SimulatedLayout) -> Answer:
    """Return the forecast: figures of the step, its time and memory by part, cost of the run, and the evidence."""
    forecast, cluster = simulation.forecast, simulation.config.cluster
    topology, price = simulation.layout.topology, cluster.price_per_gpu_hour
    published = list(_published_tables(simulation)) if simulation.is_deepseek_v3_layout else []
    blocks: list[Block] = [
        _properties(simulation),
        _times(forecast),
        _memory(simulation),
        *forecast_figures(forecast, cluster.memory_gb),
        *(block for block, _ in published),
        *phase_cost_blocks(simulation.phase_costs, price),
        *_evidence(simulation),
        Paragraph(f"Convention: {FLOP_CONVENTION}."),
    ]
    data = plan_header() | {
        "run": run_description(simulation.config),
        "layout": layout_as_dict(forecast, simulation.pretraining_gpu_hours),
        "flops_per_token": forecast.flops_per_token.main_model,
        "convention": FLOP_CONVENTION,
        "time_term_shares": {name: seconds / forecast.step_seconds for name, seconds in _all_times(forecast).items()},
        "pipeline_wait_seconds": _pipeline_waits(forecast),
        "time_terms_by_rank": list(forecast.time_terms_by_rank),
        "deepseek_report_terms": forecast.deepseek_report_terms(),
        "memory_by_rank": [memory_by_kind(memory) | {"total": memory.total} for memory in forecast.memory_by_rank],
        "memory_without_recompute_bytes": simulation.peak_bytes_without_recompute,
        "memory_limit_bytes": None if cluster.memory_gb is None else cluster.memory_gb * 1e9,
        "p2p_seconds": forecast.p2p_seconds,
        "evidence_shares": forecast.evidence_coverage.evidence_shares(),
        "substituted_rows": forecast.evidence_coverage.substituted_rows,
        "assumptions": [list(row) for row in simulation.assumptions],
        "published_step_errors": [],
        **{key: value for _, values in published for key, value in values.items()},
        **phase_cost_data(simulation.phase_costs, price),
    }
    grid = f"pp{topology.pp} edp{topology.edp} ep{topology.ep}"
    names = f"{simulation.config.model.name} on {topology.world_size} {cluster.name}"
    title = f"{names}: {grid}, {simulation.layout.schedule}"
    return Answer.from_blocks(title, data, blocks, list(_cards(simulation)))


def _cards(simulation: SimulatedLayout) -> Iterator[HeadlineCard]:
    forecast, cluster = simulation.forecast, simulation.config.cluster
    seconds, memory_gb = forecast.step_seconds, cluster.memory_gb
    yield HeadlineCard("step", *((f"{seconds:.3f}", "s") if seconds > 0.1 else (f"{seconds * 1e3:.2f}", "ms")))
    yield HeadlineCard("throughput", f"{forecast.tokens_per_second_per_gpu:,.0f}", "tokens/s/GPU")
    peak = f"of {forecast.peak_flops_per_gpu / 1e12:.4g} TFLOPS; main model, causal, without MTP"
    yield HeadlineCard("MFU", f"{forecast.mfu:.2%}", note=peak)
    if memory_gb is not None:
        needed = forecast.peak_bytes_with_fragmentation / 1e9
        verdict = "fits" if needed <= memory_gb else "does NOT fit"
        without = f"{forecast.peak_memory.total / 1e9:.1f} without fragmentation"
        yield HeadlineCard("peak memory per rank", f"{needed:.1f}", "GB", f"of {memory_gb:g}: {verdict}; {without}")
    hours, price = simulation.pretraining_gpu_hours, cluster.price_per_gpu_hour
    note = "" if price is None else f"{format_significant(hours * price)} USD"
    yield HeadlineCard("pre-training", format_significant(hours), "GPU-hours", note)


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
        _FORECAST: base,
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


def _properties(simulation: SimulatedLayout) -> TableBlock:
    recipe = simulation.forecast.recipe
    overlap = "" if recipe.overlap else ", no overlap in FB"
    sms = f", {recipe.comm_sms} SMs reserved for communication" if recipe.comm_sms else ""
    memory = f"recompute {recipe.recompute_name}, optimizer state {recipe.moment_bytes} bytes/param"
    flops = number(simulation.forecast.flops_per_token.main_model, ".4g", " G", scale=1e-9)
    rows: list[Sequence[Cell]] = [
        ("FLOPs per token", flops),
        ("precision, recompute", f"{recipe.precision}, {memory}"),
        ("token dispatcher", f"{recipe.exchange_name}{sms}{overlap}"),
        ("bottleneck", simulation.forecast.bottleneck),
    ]
    ramp = simulation.config.training.rampup_start_batch_size
    if simulation.is_deepseek_v3_layout and ramp is not None and ramp != PUBLISHED_INITIAL_BATCH:
        problem = batch_size_problem(simulation.layout, PUBLISHED_INITIAL_BATCH)
        reason = problem or f"the published {PUBLISHED_INITIAL_BATCH:,} are legal in this layout"
        rows.append(("differs from published run", f"ramp from {ramp:,} sequences: {reason}"))
    return table("", (), rows)


def _pipeline_waits(forecast: StepForecast) -> dict[str, float]:
    """Return the two parts of pipeline wait, in seconds."""
    wait, ideal = forecast.mean_time_terms[PIPELINE_WAIT], forecast.bubble_seconds
    return {"of_the_ideal_schedule": ideal, "from_imbalance": wait - ideal}


def _all_times(forecast: StepForecast) -> dict[str, float]:
    waits = {f"{PIPELINE_WAIT}_{name}": seconds for name, seconds in _pipeline_waits(forecast).items()}
    return forecast.mean_time_terms | waits


def _times(forecast: StepForecast) -> TableBlock:
    """Return the time terms of the ledger, and the two parts of pipeline wait."""
    # Without the names of DeepSeek's report: `_published_phases` prints those, with all-to-alls inside.
    rows = [
        TableRow(
            (to_label(name), number(seconds, ".4g"), number(seconds / forecast.step_seconds, ".1%")),
            begins_group=name == f"{PIPELINE_WAIT}_of_the_ideal_schedule",
        )
        for name, seconds in _all_times(forecast).items()
    ]
    return table("Where a step goes, mean over ranks", ("term", "seconds", "share"), rows)


def _memory(simulation: SimulatedLayout) -> TableBlock:
    peak = simulation.forecast.peak_memory
    rows = [TableRow((memory_label(name), _gigabytes(size))) for name, size in memory_by_kind(peak).items()]
    rows.append(TableRow(("total", _gigabytes(peak.total)), is_total=True))
    if (without := simulation.peak_bytes_without_recompute) is not None:
        rows.append(TableRow(("without DeepSeek's memory savings (no recompute)", _gigabytes(without))))
    return table("Memory of the rank that needs most", ("part", "GB"), rows)


def _gigabytes(size: float) -> Quantity:
    return number(size, ".2f", scale=1e-9)


def _published_tables(simulation: SimulatedLayout) -> Iterator[tuple[TableBlock, dict[str, object]]]:
    """Yield comparisons with DeepSeek's published figures, each with its part of the JSON."""
    yield _published_phases(simulation.forecast)
    yield _traced_pair(simulation)
    errors = published_step_errors(simulation)
    rows = [TableRow((name, number(seconds, ".3f"), number(error, "+.1%"))) for name, seconds, error in errors]
    first_what_if = 1 + [name for name, _, _ in errors].index(_FORECAST)
    rows[first_what_if] = replace(rows[first_what_if], begins_group=True)
    title = f"Error against the published step of {PUBLISHED_STEP_SECONDS} s (not fitted)"
    data: dict[str, object] = {"published_step_errors": [list(row) for row in errors]}
    yield table(title, ("scenario", "seconds", "error"), rows), data


def _published_phases(forecast: StepForecast) -> tuple[TableBlock, dict[str, object]]:
    phases = []
    for name, seconds in seconds_by_published_phase(forecast).items():
        error = seconds / (published := PUBLISHED_PHASE_SECONDS[name]) - 1
        phases.append({"phase": name, "seconds": seconds, "published_seconds": published, "error": error})
    title = "The step in the phases of the published table"
    headings = {"phase": "phase", "seconds": "seconds", "published_seconds": "published", "error": "error"}
    formats = {"seconds": "{:.4g}".format, "published_seconds": "{:.2f}".format, "error": "{:+.1%}".format}
    note = (
        "1F to 1F1B include exposed all-to-alls; bubble: all waiting for other stages; "
        "opt: gradient sums and optimizer."
    )
    return records_table(title, headings, phases, formats, note), {"published_phases": phases}


def _traced_pair(simulation: SimulatedLayout) -> tuple[TableBlock, dict[str, object]]:
    costs = simulation.forecaster.chunk_time_model(simulation.layout, simulation.forecast.recipe)
    pairs = []
    for name, use_traced_rows in (("as in the trace", True), ("balanced", False)):
        streams = simulate_traced_chunk_pair(costs, use_traced_rows=use_traced_rows)
        seconds, exposed = streams.elapsed_seconds, exposed_communication_share(streams)
        pair = {"tokens_per_expert": name, "seconds": seconds, "error": seconds / TRACED_CHUNK_PAIR_SECONDS - 1}
        shares = {"exposed_communication_share": exposed, "traced_exposed_communication_share": TRACED_EXPOSED_SHARE}
        pairs.append(pair | shares)
    # The kernel times come from this trace, so this checks the simulation of streams and predicts nothing.
    title = "Consistency check: the overlapped pair of four MoE layers, simulated with the public trace's kernel times"
    names = ("tokens per expert", "ms", "error vs. 129.0 ms trace", "exposed communication", "traced")
    formats: Formats = {
        **dict.fromkeys(shares, "{:.1%}".format),
        "seconds": lambda seconds: f"{1e3 * seconds:.1f}",
        "error": "{:+.1%}".format,
    }
    return records_table(title, dict(zip(pairs[0], names, strict=True)), pairs, formats), {"traced_chunk_pair": pairs}


def _evidence(simulation: SimulatedLayout) -> Iterator[TableBlock]:
    coverage = simulation.forecast.evidence_coverage
    shares = ", ".join(f"{name} {share:.0%}" for name, share in coverage.evidence_shares().items())
    title = f"Evidence, by time of distinct operations: {shares}"
    yield replace(table(title, ("assumption", "evidence", "source"), simulation.assumptions), is_collapsed=True)
    if rows := list(coverage.substituted_rows.items()):
        title = f"{len(rows)} shapes without a measured row"
        yield replace(table(title, ("operation", "estimated from"), rows), is_collapsed=True)
