"""Every layout of a model on a cluster: illegal, too big, simulated, or excluded by a bound."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from ...comm.errors import ConfigError
from ...comm.topology import Topology
from ...parallelism.pipeline.schedules.registry import SCHEDULES, build_placement, schedule_problems
from ...trainer.model.recompute import RecomputeModule
from .forecast import Forecast, Forecaster, Layout, needed_bytes
from .recipe import EVERYTHING, NOTHING, REPORT, Precision, Recipe


@dataclass(frozen=True)
class SearchSpace:
    """What is searched. Powers of two divide a cluster of whole nodes."""

    gpus: int
    gpus_per_node: int
    schedules: tuple[str, ...] = tuple(schedule.name for schedule in SCHEDULES)
    micro_batches: tuple[int, ...] = (1, 2, 4)
    recomputes: tuple[frozenset[RecomputeModule], ...] = (
        NOTHING,
        REPORT,
        EVERYTHING,
        EVERYTHING - {RecomputeModule.GATE_UP},
    )
    precisions: tuple[Precision, ...] = (Precision.FP8, Precision.BF16)

    def candidates(self, recipe: Recipe) -> Iterator[tuple[Layout, Recipe]]:
        """Every combination, legal or not; `recipe` says what is not searched."""
        for pp, ep in product(_powers(self.gpus), _powers(self.gpus)):
            if pp * ep > self.gpus or self.gpus % (pp * ep):
                continue
            topology = Topology(pp=pp, edp=self.gpus // (pp * ep), ep=ep, gpus_per_node=self.gpus_per_node)
            for schedule, micro_batch in product(self.schedules, self.micro_batches):
                layout = Layout(topology, schedule, micro_batch)
                for recompute, precision in product(self.recomputes, self.precisions):
                    yield layout, replace(recipe, recompute=recompute, precision=precision)


def _powers(limit: int) -> list[int]:
    return [2**k for k in range(limit.bit_length()) if 2**k <= limit]


@dataclass
class SearchResult:
    """The best layouts, and what has become of all others."""

    best: list[Forecast] = field(default_factory=list)
    """Fastest first."""
    considered: int = 0
    illegal: Counter[str] = field(default_factory=Counter)
    """By reason."""
    unfit: Counter[str] = field(default_factory=Counter)
    """By what takes most of the memory."""
    unpriced: Counter[str] = field(default_factory=Counter)
    """By what the cluster does not say."""
    simulated: int = 0
    excluded: int = 0
    """By their lower bound."""
    smallest_excluded: float | None = None
    """The smallest of these bounds, in seconds a step: above the slowest of `best`."""
    seconds: float = 0.0
    """Of the search."""
    simulation_seconds: float = 0.0
    """Of the processor, in full simulations; programs are built once and for several of them."""


def search(
    forecaster: Forecaster,
    candidates: Iterator[tuple[Layout, Recipe]] | Sequence[tuple[Layout, Recipe]],
    global_batch: int,
    keep: int = 5,
    *,
    exhaustive: bool = False,
    refusal: Callable[[Layout, Recipe], str | None] = lambda layout, recipe: None,
) -> SearchResult:
    """The `keep` (at least 1) fastest layouts that are legal and fit. With `exhaustive` nothing is excluded by a bound.

    `refusal`: why the run itself would be refused in a layout, None where it would not.
    """
    began = time.perf_counter()
    result, open_ones = SearchResult(), []
    for layout, recipe in candidates:
        result.considered += 1
        try:
            if reason := illegality(forecaster, layout, global_batch) or refusal(layout, recipe):
                result.illegal[reason] += 1
            elif reason := unfitness(forecaster, layout, recipe, global_batch):
                result.unfit[reason] += 1
            else:
                open_ones.append((forecaster.lower_bound(layout, recipe, global_batch), layout, recipe))
        except ConfigError as refused:
            result.unpriced[_unknown(refused)] += 1
    open_ones.sort(key=lambda entry: entry[0])
    for number, (bound, layout, recipe) in enumerate(open_ones):
        if not exhaustive and len(result.best) >= keep and bound > result.best[-1].seconds:
            result.excluded = len(open_ones) - number
            result.smallest_excluded = bound
            break
        forecaster.prepare(layout, global_batch)
        started = time.process_time()
        try:
            result.best.append(forecaster.forecast(layout, recipe, global_batch))
        except ConfigError as refused:
            result.unpriced[_unknown(refused)] += 1
            continue
        result.simulation_seconds += time.process_time() - started
        result.simulated += 1
        result.best.sort(key=lambda forecast: forecast.seconds)
        del result.best[keep:]
    result.seconds = time.perf_counter() - began
    return result


def _unknown(refused: ConfigError) -> str:
    return f"{refused.problems[0].field} does not say enough"


def illegality(forecaster: Forecaster, layout: Layout, global_batch: int) -> str | None:
    """Why a layout cannot be, in a few words that many share; None if it can."""
    topology, model = layout.topology, forecaster.model
    if model.n_routed_experts % topology.ep:
        return "experts do not divide over ep"
    if model.n_routed_experts % max(1, topology.ep_nodes):
        return "experts do not divide over nodes"
    if any(True for _ in topology.problems()):
        return "expert-parallel groups do not fill nodes evenly"
    if global_batch % (topology.dp * layout.micro_batch):
        return "the batch does not divide over ranks and micro-batches"
    count = layout.micro_batches(global_batch)
    for problem in schedule_problems(layout.schedule, topology.pp, count, layout.chunks):
        words = {"ranks": "ranks do not suit the schedule", "micro_batches": "too few or odd micro-batches"}
        return f"{words.get(problem.field, problem.field)} ({layout.schedule})"
    if build_placement(layout.schedule, topology.pp, layout.chunks).stages > model.num_hidden_layers:
        return "more stages than layers"
    return None


def unfitness(forecaster: Forecaster, layout: Layout, recipe: Recipe, global_batch: int) -> str | None:
    """What takes most of the memory of a layout that does not fit; None if it does."""
    limit = forecaster.cluster.memory_gb
    assert limit is not None
    limit *= 1e9
    static = forecaster.static_memory(layout, recipe)
    if static > limit:
        return "weights, gradients and optimizer alone"
    ranks = forecaster.memory(layout, recipe, forecaster.program(layout, global_batch))
    worst = max(ranks, key=lambda memory: needed_bytes(memory, recipe))
    if needed_bytes(worst, recipe) <= limit:
        return None
    parts = {
        "weights, gradients and optimizer": worst.weights + worst.gradients + worst.optimizer,
        "activations in flight": worst.activations + worst.deferred,
        "one layer and the logits": worst.working,
    }
    return f"mostly {max(parts, key=lambda part: parts[part])}"
