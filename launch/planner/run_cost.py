"""Cost of a whole run in GPU-hours: batch ramp, full batch, failures, and the later phases of DeepSeek's run.

A batch that the layout cannot run is reported with the nearest legal one. Phases that cannot be simulated have their
published cost and are marked `published`.

Failures follow Young's and Daly's first-order model: with a failure every M seconds, a checkpoint every t seconds that
blocks for d and a restart that takes r, the lost share is d/t + t/(2 M) + r/M, least at t = sqrt(2 d M).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from ...comm.errors import ConfigError, Problem
from ...comm.units import format_count
from ...parallelism.pipeline.schedules.registry import nearest_valid_micro_batches, schedule_problems
from ...trainer.config import RunConfig
from ...trainer.ledger.terms import PUBLISHED_GPU_HOURS
from ...trainer.run.batch_ramp import BatchRamp
from .forecast import ParallelLayout, StepForecast, StepForecaster
from .published import is_deepseek_v3_run
from .recipe import MIN_COMM_SMS, ForecastRecipe

SIMULATED = "simulated"
_RAMP_POINTS = 3
"""Simulated batch sizes of the ramp; between them step time is taken as linear in the number of micro-batches."""


@dataclass(frozen=True)
class RunPhaseCost:
    """Cost of one phase of a run."""

    name: str
    gpu_hours: float
    evidence: str
    """`simulated`, or `published` where the planner cannot simulate the phase."""
    note: str = ""


CONTEXT_EXTENSION_PHASES = ((32_768, 1920), (131_072, 480))
"""Sequence length and global batch of the phases of context extension, of 1,000 steps each (report §4.3)."""


def run_phase_costs(config: RunConfig, forecaster: StepForecaster, forecast: StepForecast) -> list[RunPhaseCost]:
    """Estimate the cost of each phase of the run of `config` in the layout of `forecast`, a step of its full batch.

    The later phases of DeepSeek-V3's run have their published cost. Raises `ConfigError` for a batch size that the
    layout cannot run.
    """
    layout, batch_ramp, tokens = forecast.layout, config.batch_ramp, config.training.tokens
    for level in batch_ramp.levels:
        if (note := batch_size_problem(layout, level.batch_size)) is not None:
            raise ConfigError([Problem("batch of a step", level.batch_size, note)])
    phases, full = [], batch_ramp.levels[-1]
    ramp = min(full.samples_before * forecaster.sequence_length, tokens)
    if ramp:
        hours = _ramp_hours(forecaster, layout, forecast.recipe, batch_ramp, ramp)
        dearer = f"{hours / forecast.gpu_hours(ramp) - 1:+.1%} over the full batch"
        note = f"from {batch_ramp.levels[0].batch_size:,} to {full.batch_size:,} sequences; {dearer}"
        phases.append(RunPhaseCost("batch ramp", hours, SIMULATED, note))
    note = f"{format_count(tokens - ramp)} tokens at full batch"
    phases.append(RunPhaseCost("pre-training", forecast.gpu_hours(tokens - ramp), SIMULATED, note))
    return [*phases, *_published(layout)] if is_deepseek_v3_run(config) else phases


def _published(layout: ParallelLayout) -> Iterator[RunPhaseCost]:
    """Yield DeepSeek's phases after pre-training, at their published cost."""
    reasons = [
        f"{length // 1024} K: {problem}"
        for length, sequences in CONTEXT_EXTENSION_PHASES
        if (problem := batch_size_problem(layout, sequences)) is not None
    ]
    note = "; ".join([*reasons, "long sequences need context parallelism, which is not supported"])
    yield RunPhaseCost("context extension", PUBLISHED_GPU_HOURS["context_extension"], "published", note)
    yield RunPhaseCost("post-training", PUBLISHED_GPU_HOURS["post_training"], "published")


def pretraining_gpu_hours(phases: Iterable[RunPhaseCost]) -> float:
    """Return the GPU-hours of the simulated phases: pre-training with its batch ramp."""
    return sum(phase.gpu_hours for phase in phases if phase.evidence == SIMULATED)


def _ramp_hours(
    forecaster: StepForecaster, layout: ParallelLayout, recipe: ForecastRecipe, batches: BatchRamp, tokens: int
) -> float:
    """Return the GPU-hours of the ramp, the first `tokens`."""
    share = layout.topology.dp * layout.micro_batch_size
    counts = [level.batch_size // share for level in batches.levels]
    # A pipeline's step is a constant (fill and drain) plus a time per micro-batch, so few points suffice; a full
    # simulation per level would cost one for each batch size between 3,072 and 15,360 sequences.
    points = sorted({counts[k * (len(counts) - 1) // (_RAMP_POINTS - 1)] for k in range(_RAMP_POINTS)})
    times = [forecaster.forecast(layout, recipe, count * share).step_seconds for count in points]
    spent, samples = 0.0, tokens / forecaster.sequence_length
    for (level, after), count in zip(pairwise(batches.levels), counts, strict=False):
        steps = max(0.0, min(after.samples_before, samples) - level.samples_before) / level.batch_size
        spent += steps * float(np.interp(count, points, times))
    return spent * layout.topology.world_size / 3600


def batch_size_problem(layout: ParallelLayout, sequences: int) -> str | None:
    """Return why a step of `sequences` is illegal in this layout, with the nearest legal number; None if legal."""
    share = layout.topology.dp * layout.micro_batch_size
    count = sequences / share
    where = f"{sequences:,} sequences = {count:g} micro-batches of {share}"
    if sequences % share:
        why = "not a whole number"
    elif any(schedule_problems(layout.schedule, layout.topology.pp, int(count), layout.chunks_per_rank)):
        why = f"illegal for {layout.schedule} on {layout.topology.pp} ranks"
    else:
        return None
    legal = nearest_valid_micro_batches(layout.schedule, layout.topology.pp, round(count), layout.chunks_per_rank)
    return f"{where}, {why}; nearest legal {legal * share:,} sequences ({legal} micro-batches)"


def sensitivity_analysis(
    forecaster: StepForecaster, layout: ParallelLayout, recipe: ForecastRecipe, global_batch: int
) -> dict[str, float]:
    """Forecast the seconds of the step with one input changed at a time, by the change.

    A table of whole phases depends on fewer inputs, so there are fewer changes.
    """
    changes: dict[str, ForecastRecipe] = {}
    if layout.topology.pp > 1:
        changes["first and last pipeline rank 8 % slower"] = replace(
            recipe, slowdown_by_pp_rank=((0, 1.08), (-1, 1.08))
        )
    if layout.topology.world_size > layout.topology.gpus_per_node:
        changes["nodes that differ by 1.4 % (standard deviation)"] = replace(recipe, jitter=0.014)
    if not forecaster.chunk_time_model(layout, recipe).compute_model.table.measured_recipe:
        changes["+10 % bandwidth of every link"] = replace(recipe, link_speed_factor=recipe.link_speed_factor * 1.1)
        changes["expert load 20 % above the mean on every critical path"] = replace(recipe, skew=0.2)
    if recipe.comm_sms > MIN_COMM_SMS and layout.topology.ep > 1:
        # No source gives all-to-all bandwidth by number of SMs: these two are the extremes.
        lent = f"{MIN_COMM_SMS} instead of {recipe.comm_sms} SMs reserved for communication"
        few = replace(recipe, comm_sms=MIN_COMM_SMS)
        changes[f"{lent}, all-to-alls as fast (DeepEP V2 on 32 ranks)"] = few
        changes[f"{lent}, links slower in proportion"] = replace(
            few, link_speed_factor=recipe.link_speed_factor * MIN_COMM_SMS / recipe.comm_sms
        )
    return {name: forecaster.forecast(layout, changed, global_batch).step_seconds for name, changed in changes.items()}


GPU_HOURS_BETWEEN_FAILURES = 16_384 * 54 * 24 / 419
"""Published: 419 unexpected interruptions in 54 days on 16,384 GPUs (Llama 3.1, arXiv 2407.21783)."""


@dataclass(frozen=True)
class FailureModel:
    """Failure and checkpoint times of a cluster. The last two defaults are assumed."""

    gpu_hours_between_failures: float = GPU_HOURS_BETWEEN_FAILURES
    checkpoint_seconds: float = 10.0
    """Seconds for which a checkpoint blocks the step."""
    restart_seconds: float = 600.0
    """Seconds from a failure to the next step, without the repeated steps."""

    def mean_seconds_between_failures(self, gpus: int) -> float:
        """Return M, the mean seconds between failures of a run on `gpus` GPUs."""
        return self.gpu_hours_between_failures * 3600 / gpus

    def best_checkpoint_interval(self, gpus: int) -> float:
        """Return the seconds between checkpoints that lose least time."""
        return math.sqrt(2 * self.checkpoint_seconds * self.mean_seconds_between_failures(gpus))

    def effective_training_share(self, gpus: int) -> float:
        """Return the share of allocated time spent on kept steps, with the best checkpoint interval."""
        mean, interval = self.mean_seconds_between_failures(gpus), self.best_checkpoint_interval(gpus)
        # First order: exact only while an interval is much shorter than M. Above 1 nothing would be kept.
        lost = self.checkpoint_seconds / interval + interval / (2 * mean) + self.restart_seconds / mean
        return max(0.0, 1 - lost)
