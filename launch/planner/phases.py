"""A whole run in GPU-hours and dollars: the batch ramp, the steady batch, context extension, post-training.

What is illegal on the grid is explained with the nearest legal numbers; what cannot be simulated stands at its
published cost and is marked so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ...parallelism.pipeline.schedules import nearest_legal, schedule_problems
from ...trainer.batches import Batches
from ...trainer.budget.terms import PUBLISHED_GPU_HOURS
from .forecast import Forecaster, Layout
from .recipe import Recipe

_RAMP_POINTS = 3
"""Batches of the ramp that are simulated; between them a step's time is taken to be linear in its micro-batches."""


@dataclass(frozen=True)
class PhaseCost:
    """One phase of a run."""

    name: str
    gpu_hours: float
    evidence: str
    """`simulated`, or `published` where the phase cannot run on the grid."""
    note: str = ""


@dataclass(frozen=True)
class LongContext:
    """A phase of context extension (report §4.3)."""

    length: int
    batch: int
    steps: int = 1000


CONTEXT_EXTENSION = (LongContext(32_768, 1920), LongContext(131_072, 480))


def run_phases(
    forecaster: Forecaster, layout: Layout, recipe: Recipe, *, tokens: int, batches: Batches
) -> list[PhaseCost]:
    """The cost of each phase of DeepSeek-V3's run in this layout; pre-training takes `tokens` in `batches`."""
    phases, full = [], batches.levels[-1]
    forecast = forecaster.forecast(layout, recipe, full.size)
    ramp = min(full.samples * forecaster.sequence_length, tokens)
    if ramp:
        hours = _ramp_hours(forecaster, layout, recipe, batches, ramp)
        dearer = f"{hours / forecast.gpu_hours(ramp) - 1:+.1%} over the full batch"
        note = f"from {batches.levels[0].size:,} to {full.size:,} sequences; {dearer}"
        illegal = next(filter(None, (_batch_note(layout, level.size) for level in batches.levels)), None)
        phases.append(PhaseCost("batch ramp", hours, "simulated", "; ".join(filter(None, (note, illegal)))))
    note = f"{(tokens - ramp) / 1e12:.2f} T tokens at full batch"
    phases.append(PhaseCost("pre-training", forecast.gpu_hours(tokens - ramp), "simulated", note))
    reasons = [long_context_note(layout, phase) for phase in CONTEXT_EXTENSION]
    phases.append(
        PhaseCost(
            "context extension",
            PUBLISHED_GPU_HOURS["context_extension"],
            "published",
            "; ".join([*filter(None, reasons), "long sequences need context parallelism, which this runtime has not"]),
        )
    )
    phases.append(PhaseCost("post-training", PUBLISHED_GPU_HOURS["post_training"], "published"))
    return phases


def pretraining_hours(phases: Sequence[PhaseCost]) -> float:
    """Of the phases that run on the grid: the ramp and the full batch."""
    return sum(phase.gpu_hours for phase in phases if phase.evidence == "simulated")


def _ramp_hours(forecaster: Forecaster, layout: Layout, recipe: Recipe, batches: Batches, tokens: int) -> float:
    """Of the first `tokens`, which steps of the ramp take. Where a size is illegal here, others stand in for it."""
    share = layout.topology.dp * layout.micro_batch
    low, high = (batches.levels[index].size // share for index in (0, -1))
    points = sorted({low, high, *(low + (high - low) * k // (_RAMP_POINTS - 1) // 2 * 2 for k in range(_RAMP_POINTS))})
    legal = [count for count in points if not any(schedule_problems(layout.schedule, layout.topology.pp, count))]
    times = {count: forecaster.forecast(layout, recipe, count * share).seconds for count in legal}

    def seconds(count: float) -> float:
        above = next((point for point in legal[1:] if point >= count), legal[-1])
        below = legal[max(0, legal.index(above) - 1)]
        slope = (times[above] - times[below]) / (above - below) if above > below else 0.0
        return times[below] + slope * (count - below)

    spent, samples = 0.0, tokens / forecaster.sequence_length
    for level, after in pairwise(batches.levels):
        steps = max(0.0, min(after.samples, samples) - level.samples) / level.size
        spent += steps * seconds(level.size / share)
    return spent * layout.topology.world_size / 3600


def long_context_note(layout: Layout, phase: LongContext) -> str | None:
    """Why a long phase is illegal on this grid, and the nearest legal batch; None if it is legal."""
    note = _batch_note(layout, phase.batch)
    return None if note is None else f"{phase.length // 1024} K: {note}"


def _batch_note(layout: Layout, sequences: int) -> str | None:
    """Why a step cannot take so many, and the nearest number that it can; None if it can."""
    share = layout.topology.dp * layout.micro_batch
    count = sequences / share
    where = f"{sequences:,} sequences are {count:g} micro-batches of {share}"
    if sequences % share:
        why = "not a whole number"
    elif any(schedule_problems(layout.schedule, layout.topology.pp, int(count), layout.chunks)):
        why = f"illegal for {layout.schedule} on {layout.topology.pp} ranks"
    else:
        return None
    legal = nearest_legal(layout.schedule, layout.topology.pp, round(count), layout.chunks)
    return f"{where}, {why}; nearest legal {legal * share:,} sequences ({legal} micro-batches)"


@dataclass(frozen=True)
class WhatIf:
    """A changed input and the step it would give."""

    name: str
    seconds: float
    note: str = ""


def sensitivity(forecaster: Forecaster, layout: Layout, recipe: Recipe, global_batch: int) -> list[WhatIf]:
    """What a change of one input would do to a step."""
    changes = {
        "+10 % pace of every link": replace(recipe, links=recipe.links * 1.1),
        "first and last pipeline rank 8 % slower": replace(recipe, slowed=((0, 1.08), (-1, 1.08))),
        "rows of the fullest rank 20 % above the mean": replace(recipe, skew=0.2),
        "nodes that differ by 1.4 % (standard deviation)": replace(recipe, jitter=0.014),
    }
    if recipe.comm_sms > 14:
        lent = recipe.comm_sms - 14
        changes[f"{lent} instead of {recipe.comm_sms} SMs lent to the exchange"] = replace(recipe, comm_sms=lent)
    return [
        WhatIf(name, forecaster.forecast(layout, changed, global_batch).seconds) for name, changed in changes.items()
    ]
