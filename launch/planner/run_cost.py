"""A whole run in GPU-hours and dollars: batch ramp, steady batch, failures, and what came after in DeepSeek's run.

What is illegal on the grid is explained with the nearest legal numbers; what cannot be simulated stands at its
published cost and is marked so.

Failures follow Young's and Daly's first-order model: with a failure every M seconds, a checkpoint every t seconds that
blocks for d and a restart that takes r, the lost share is d/t + t/(2 M) + r/M, least at t = sqrt(2 d M).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from ...comm.errors import ConfigError, Problem
from ...parallelism.pipeline.schedules.registry import nearest_valid_micro_batches, schedule_problems
from ...trainer.ledger.terms import PUBLISHED_GPU_HOURS
from ...trainer.run.batch_ramp import BatchRamp
from .forecast import ParallelLayout, StepForecaster
from .recipe import MIN_COMM_SMS, ForecastRecipe

SIMULATED = "simulated"
_RAMP_POINTS = 3
"""Batches of the ramp that are simulated; between them a step's time is taken to be linear in its micro-batches."""


@dataclass(frozen=True)
class RunPhaseCost:
    """One phase of a run."""

    name: str
    gpu_hours: float
    evidence: str
    """`simulated`, or `published` where the planner cannot simulate the phase."""
    note: str = ""


@dataclass(frozen=True)
class ContextExtensionPhase:
    """A phase of context extension (report §4.3)."""

    sequence_length: int
    global_batch: int
    steps: int = 1000


CONTEXT_EXTENSION_PHASES = (ContextExtensionPhase(32_768, 1920), ContextExtensionPhase(131_072, 480))


def estimate_phase_costs(
    forecaster: StepForecaster,
    layout: ParallelLayout,
    recipe: ForecastRecipe,
    *,
    tokens: int,
    batch_ramp: BatchRamp,
    include_published_phases: bool,
) -> list[RunPhaseCost]:
    """The cost of each phase of a run in this layout; pre-training takes `tokens` in `batches`.

    `published`: of DeepSeek-V3's run, whose later phases are known too. Raises `ConfigError` for a batch size that the
    layout cannot run.
    """
    _refuse_illegal(layout, batch_ramp)
    phases, full = [], batch_ramp.levels[-1]
    forecast = forecaster.forecast(layout, recipe, full.batch_size)
    ramp = min(full.samples_before * forecaster.sequence_length, tokens)
    if ramp:
        hours = _ramp_hours(forecaster, layout, recipe, batch_ramp, ramp)
        dearer = f"{hours / forecast.gpu_hours(ramp) - 1:+.1%} over the full batch"
        note = f"from {batch_ramp.levels[0].batch_size:,} to {full.batch_size:,} sequences; {dearer}"
        phases.append(RunPhaseCost("batch ramp", hours, SIMULATED, note))
    note = f"{_scaled(tokens - ramp)} tokens at full batch"
    phases.append(RunPhaseCost("pre-training", forecast.gpu_hours(tokens - ramp), SIMULATED, note))
    return [*phases, *_published(layout)] if include_published_phases else phases


def _refuse_illegal(layout: ParallelLayout, batches: BatchRamp) -> None:
    """The price of a step that cannot be taken is no one's to know."""
    for level in batches.levels:
        note = _batch_note(layout, level.batch_size)
        if note is not None:
            raise ConfigError([Problem("batch of a step", level.batch_size, note)])


def _published(layout: ParallelLayout) -> Iterator[RunPhaseCost]:
    """What DeepSeek's run did after pre-training, at what it has cost there."""
    reasons = [context_extension_problem(layout, phase) for phase in CONTEXT_EXTENSION_PHASES]
    note = "; ".join([*filter(None, reasons), "long sequences need context parallelism, which this runtime has not"])
    yield RunPhaseCost("context extension", PUBLISHED_GPU_HOURS["context_extension"], "published", note)
    yield RunPhaseCost("post-training", PUBLISHED_GPU_HOURS["post_training"], "published")


def pretraining_gpu_hours(phases: Iterable[RunPhaseCost]) -> float:
    """GPU-hours of what was simulated: pre-training with its ramp."""
    return sum(phase.gpu_hours for phase in phases if phase.evidence == SIMULATED)


def format_significant(number: float) -> str:
    """Whole from 100 on, else three digits that say something."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def _scaled(tokens: float) -> str:
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if tokens >= unit:
            return f"{tokens / unit:.4g} {letter}"
    return f"{tokens:,.0f}"


def _ramp_hours(
    forecaster: StepForecaster, layout: ParallelLayout, recipe: ForecastRecipe, batches: BatchRamp, tokens: int
) -> float:
    """Of the first `tokens`, which steps of the ramp take."""
    share = layout.topology.dp * layout.micro_batch_size
    counts = [level.batch_size // share for level in batches.levels]
    points = sorted({counts[k * (len(counts) - 1) // (_RAMP_POINTS - 1)] for k in range(_RAMP_POINTS)})
    times = {count: forecaster.forecast(layout, recipe, count * share).step_seconds for count in points}

    def seconds(count: int) -> float:
        above = next(point for point in points[1:] if point >= count)
        below = points[points.index(above) - 1]
        slope = (times[above] - times[below]) / (above - below)
        return times[below] + slope * (count - below)

    spent, samples = 0.0, tokens / forecaster.sequence_length
    for (level, after), count in zip(pairwise(batches.levels), counts, strict=False):
        steps = max(0.0, min(after.samples_before, samples) - level.samples_before) / level.batch_size
        spent += steps * seconds(count)
    return spent * layout.topology.world_size / 3600


def context_extension_problem(layout: ParallelLayout, phase: ContextExtensionPhase) -> str | None:
    """Why a long phase is illegal on this grid, and the nearest legal batch; None if it is legal."""
    note = _batch_note(layout, phase.global_batch)
    return None if note is None else f"{phase.sequence_length // 1024} K: {note}"


def _batch_note(layout: ParallelLayout, sequences: int) -> str | None:
    """Why a step cannot take so many, and the nearest number that it can; None if it can."""
    share = layout.topology.dp * layout.micro_batch_size
    count = sequences / share
    where = f"{sequences:,} sequences are {count:g} micro-batches of {share}"
    if sequences % share:
        why = "not a whole number"
    elif any(schedule_problems(layout.schedule, layout.topology.pp, int(count), layout.chunks_per_rank)):
        why = f"illegal for {layout.schedule} on {layout.topology.pp} ranks"
    else:
        return None
    legal = nearest_valid_micro_batches(layout.schedule, layout.topology.pp, round(count), layout.chunks_per_rank)
    return f"{where}, {why}; nearest legal {legal * share:,} sequences ({legal} micro-batches)"


@dataclass(frozen=True)
class WhatIfStep:
    """A changed input and the step it would give."""

    name: str
    step_seconds: float
    note: str = ""


def sensitivity_analysis(
    forecaster: StepForecaster, layout: ParallelLayout, recipe: ForecastRecipe, global_batch: int
) -> list[WhatIfStep]:
    """What a change of one input would do to a step. Where phases were timed whole, some inputs change nothing."""
    changes: dict[str, ForecastRecipe] = {}
    if layout.topology.pp > 1:
        changes["first and last pipeline rank 8 % slower"] = replace(
            recipe, slowdown_by_pp_rank=((0, 1.08), (-1, 1.08))
        )
    if layout.topology.world_size > layout.topology.gpus_per_node:
        changes["nodes that differ by 1.4 % (standard deviation)"] = replace(recipe, jitter=0.014)
    if not forecaster.chunk_time_model(layout, recipe).compute_model.table.measured_recipe:
        changes["+10 % pace of every link"] = replace(recipe, link_speed_factor=recipe.link_speed_factor * 1.1)
        changes["experts' rows 20 % above the mean on every rank's critical path"] = replace(recipe, skew=0.2)
    if recipe.comm_sms > MIN_COMM_SMS and layout.topology.ep > 1:
        # Nothing says how the pace of an exchange depends on its SMs: these are the ends of what it may be.
        lent = f"{MIN_COMM_SMS} instead of {recipe.comm_sms} SMs lent"
        few = replace(recipe, comm_sms=MIN_COMM_SMS)
        changes[f"{lent}, exchanges as fast (DeepEP V2 with 32 ranks)"] = few
        changes[f"{lent}, links slower in proportion"] = replace(
            few, link_speed_factor=recipe.link_speed_factor * MIN_COMM_SMS / recipe.comm_sms
        )
    return [
        WhatIfStep(name, forecaster.forecast(layout, changed, global_batch).step_seconds)
        for name, changed in changes.items()
    ]


GPU_HOURS_BETWEEN_FAILURES = 16_384 * 54 * 24 / 419
"""Published: 419 unexpected interruptions in 54 days on 16,384 GPUs (Llama 3.1, arXiv 2407.21783)."""


@dataclass(frozen=True)
class FailureModel:
    """Inputs, all of them to be replaced by those of the cluster at hand. The last two are assumed."""

    gpu_hours_between_failures: float = GPU_HOURS_BETWEEN_FAILURES
    checkpoint_seconds: float = 10.0
    """For which a checkpoint blocks the step."""
    restart_seconds: float = 600.0
    """From a failure to the next step, without the steps that are run again."""

    def mean_seconds_between_failures(self, gpus: int) -> float:
        """M, of a run on so many GPUs."""
        return self.gpu_hours_between_failures * 3600 / gpus

    def best_checkpoint_interval(self, gpus: int) -> float:
        """Seconds between checkpoints that lose least."""
        return math.sqrt(2 * self.checkpoint_seconds * self.mean_seconds_between_failures(gpus))

    def effective_training_share(self, gpus: int) -> float:
        """Of the allocated time, what is spent on steps that stay, with the best interval."""
        mean, interval = self.mean_seconds_between_failures(gpus), self.best_checkpoint_interval(gpus)
        lost = self.checkpoint_seconds / interval + interval / (2 * mean) + self.restart_seconds / mean
        return max(0.0, 1 - lost)
