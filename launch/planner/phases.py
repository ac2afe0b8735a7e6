"""A whole run in GPU-hours and dollars: the batch ramp, the steady batch, and of DeepSeek's run what came after.

What is illegal on the grid is explained with the nearest legal numbers; what cannot be simulated stands at its
published cost and is marked so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ...comm.refusal import Problem, Refused
from ...parallelism.pipeline.schedules import schedule_problems
from ...trainer.budget.terms import PUBLISHED_GPU_HOURS
from .forecast import Forecaster, Layout
from .recipe import FEWEST_SMS, Recipe

SIMULATED = "simulated"
_RAMP_POINTS = 3
"""Batches of the ramp that are simulated; between them a step's time is taken to be linear in its micro-batches."""


@dataclass(frozen=True)
class PhaseCost:
    """One phase of a run."""

    name: str
    gpu_hours: float
    evidence: str
    """`simulated`, or `published` where the planner cannot simulate the phase."""
    note: str = ""


@dataclass(frozen=True)
class LongContext:
    """A phase of context extension (report §4.3)."""

    length: int
    batch: int
    steps: int = 1000


CONTEXT_EXTENSION = (LongContext(32_768, 1920), LongContext(131_072, 480))


def run_phases(
    forecaster: Forecaster,
    layout: Layout,
    recipe: Recipe,
    *,
    tokens: float,
    global_batch: int,
    ramp_from: int | None,
    ramp_tokens: float,
    published: bool,
) -> list[PhaseCost]:
    """The cost of each phase of a run in this layout; `published`: DeepSeek-V3's, whose later phases are known too."""
    phases = []
    ramp = 0.0
    if ramp_from is not None and ramp_from < global_batch and ramp_tokens:
        ramp = min(ramp_tokens, tokens)
        hours = _ramp_hours(forecaster, layout, recipe, ramp_from, global_batch, ramp)
        steady = forecaster.forecast(layout, recipe, global_batch).gpu_hours(ramp)
        note = f"from {ramp_from:,} to {global_batch:,} sequences; {hours / steady - 1:+.1%} over the full batch"
        phases.append(PhaseCost("batch ramp", hours, SIMULATED, note))
    steady = forecaster.forecast(layout, recipe, global_batch).gpu_hours(tokens - ramp)
    phases.append(PhaseCost("pre-training", steady, SIMULATED, f"{_scaled(tokens - ramp)} tokens at full batch"))
    return [*phases, *_published(layout)] if published else phases


def _published(layout: Layout) -> Iterator[PhaseCost]:
    """What DeepSeek's run did after pre-training, at what it has cost there."""
    reasons = [long_context_note(layout, phase) for phase in CONTEXT_EXTENSION]
    note = "; ".join([*filter(None, reasons), "long sequences need context parallelism, which this runtime has not"])
    yield PhaseCost("context extension", PUBLISHED_GPU_HOURS["context_extension"], "published", note)
    yield PhaseCost("post-training", PUBLISHED_GPU_HOURS["post_training"], "published")


def simulated_hours(phases: Iterable[PhaseCost]) -> float:
    """GPU-hours of what was simulated: pre-training with its ramp."""
    return sum(phase.gpu_hours for phase in phases if phase.evidence == SIMULATED)


def significant(number: float) -> str:
    """Whole from 100 on, else three digits that say something."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def _scaled(tokens: float) -> str:
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if tokens >= unit:
            return f"{tokens / unit:.4g} {letter}"
    return f"{tokens:,.0f}"


def _ramp_hours(forecaster: Forecaster, layout: Layout, recipe: Recipe, first: int, last: int, tokens: float) -> float:
    """The batch grows evenly with the consumed tokens, so each of its sizes has the same share of them."""
    share = layout.topology.dp * layout.micro_batch
    low, high = first // share, last // share
    points = sorted({low, high, *(low + (high - low) * k // (_RAMP_POINTS - 1) // 2 * 2 for k in range(_RAMP_POINTS))})
    grid = layout.schedule, layout.topology.pp
    legal = [count for count in points if not any(schedule_problems(*grid, count, layout.chunks))]
    if low not in legal:  # the search counts such layouts as illegal, and a configuration is refused
        nearest = _nearest_legal(layout, low)
        remedy = f"gives {low} micro-batches in the first step; nearest legal {nearest * share:,} ({nearest})"
        raise Refused([Problem("training.ramp_from", first, remedy)])
    times = {count: forecaster.forecast(layout, recipe, count * share).seconds for count in legal}

    def seconds(count: float) -> float:
        above = next((point for point in legal[1:] if point >= count), legal[-1])
        below = legal[max(0, legal.index(above) - 1)]
        slope = (times[above] - times[below]) / (above - below) if above > below else 0.0
        return times[below] + slope * (count - below)

    samples = [low + (high - low) * (k + 0.5) / 200 for k in range(200)]
    per_token = sum(seconds(count) / (count * share * forecaster.sequence_length) for count in samples) / len(samples)
    return per_token * tokens * layout.topology.world_size / 3600


def long_context_note(layout: Layout, phase: LongContext) -> str | None:
    """Why a long phase is illegal on this grid, and the nearest legal batch; None if it is legal."""
    share = layout.topology.dp * layout.micro_batch
    count = phase.batch / share
    where = f"{phase.length // 1024} K: {phase.batch:,} sequences are {count:g} micro-batches of {share}"
    if phase.batch % share:
        whole = max(1, round(count))
        legal = _nearest_legal(layout, whole)
        return f"{where}, not a whole number; nearest legal {legal * share:,} sequences ({legal} micro-batches)"
    problems = list(schedule_problems(layout.schedule, layout.topology.pp, int(count), layout.chunks))
    if not problems:
        return None
    legal = _nearest_legal(layout, int(count))
    return (
        f"{where}, illegal for {layout.schedule} on {layout.topology.pp} ranks; "
        f"nearest legal {legal * share:,} sequences ({legal} micro-batches)"
    )


def _nearest_legal(layout: Layout, count: int) -> int:
    """The nearest number of micro-batches that the schedule takes."""
    for distance in range(4 * layout.topology.pp + 4):
        for candidate in (count - distance, count + distance):
            if candidate > 0 and not any(
                schedule_problems(layout.schedule, layout.topology.pp, candidate, layout.chunks)
            ):
                return candidate
    return count


@dataclass(frozen=True)
class WhatIf:
    """A changed input and the step it would give."""

    name: str
    seconds: float
    note: str = ""


def sensitivity(forecaster: Forecaster, layout: Layout, recipe: Recipe, global_batch: int) -> list[WhatIf]:
    """What a change of one input would do to a step. Where phases were timed whole, some inputs change nothing."""
    changes: dict[str, Recipe] = {}
    if layout.topology.pp > 1:
        changes["first and last pipeline rank 8 % slower"] = replace(recipe, slowed=((0, 1.08), (-1, 1.08)))
    if layout.topology.world_size > layout.topology.gpus_per_node:
        changes["nodes that differ by 1.4 % (standard deviation)"] = replace(recipe, jitter=0.014)
    if not forecaster.costs(layout, recipe).cost.table.measured_with:
        changes["+10 % pace of every link"] = replace(recipe, links=recipe.links * 1.1)
        changes["experts' rows 20 % above the mean on every rank's critical path"] = replace(recipe, skew=0.2)
    if recipe.comm_sms > FEWEST_SMS and layout.topology.ep > 1:
        # Nothing says how the pace of an exchange depends on its SMs: these are the ends of what it may be.
        lent = f"{FEWEST_SMS} instead of {recipe.comm_sms} SMs lent"
        few = replace(recipe, comm_sms=FEWEST_SMS)
        changes[f"{lent}, exchanges as fast (DeepEP V2 with 32 ranks)"] = few
        changes[f"{lent}, links slower in proportion"] = replace(few, links=recipe.links * FEWEST_SMS / recipe.comm_sms)
    return [
        WhatIf(name, forecaster.forecast(layout, changed, global_batch).seconds) for name, changed in changes.items()
    ]
