"""Search over the layouts of a model on a cluster: each is illegal, out of memory, simulated or pruned by a bound."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from ...comm.errors import ConfigError
from ...comm.topology import Topology
from ...parallelism.pipeline.schedules.registry import SCHEDULES, build_placement, schedule_problems
from ...trainer.memory.chunk import MemoryKind
from ...trainer.model.recompute import RecomputeModule
from .forecast import ParallelLayout, StepForecast, StepForecaster, bytes_with_fragmentation
from .recipe import RECOMPUTE_DEEPSEEK_V3, RECOMPUTE_EVERYTHING, RECOMPUTE_NOTHING, ForecastRecipe, GemmPrecision


@dataclass(frozen=True)
class SearchSpace:
    """Values that the search combines."""

    gpus: int
    gpus_per_node: int
    schedules: tuple[str, ...] = tuple(schedule.name for schedule in SCHEDULES)
    micro_batches: tuple[int, ...] = (1, 2, 4)
    recompute_policies: tuple[frozenset[RecomputeModule], ...] = (
        RECOMPUTE_NOTHING,
        RECOMPUTE_DEEPSEEK_V3,
        RECOMPUTE_EVERYTHING,
        RECOMPUTE_EVERYTHING - {RecomputeModule.GATE_UP},
    )
    precisions: tuple[GemmPrecision, ...] = (GemmPrecision.FP8, GemmPrecision.BF16)

    def candidates(self, recipe: ForecastRecipe) -> Iterator[tuple[ParallelLayout, ForecastRecipe]]:
        """Yield every combination, legal or not; `recipe` gives the values that are not searched."""
        # Only powers of two: they divide nodes of 8 GPUs and V3's 256 experts. Layouts such as pp 14 x edp 9 x ep 16 on
        # 2,016 GPUs, which would fit, are not found.
        for pp, ep in product(_powers(self.gpus), _powers(self.gpus)):
            if pp * ep > self.gpus or self.gpus % (pp * ep):
                continue
            topology = Topology(pp=pp, edp=self.gpus // (pp * ep), ep=ep, gpus_per_node=self.gpus_per_node)
            for schedule, micro_batch in product(self.schedules, self.micro_batches):
                layout = ParallelLayout(topology, schedule, micro_batch)
                for recompute, precision in product(self.recompute_policies, self.precisions):
                    yield layout, replace(recipe, recompute=recompute, precision=precision)


def _powers(limit: int) -> list[int]:
    return [2**k for k in range(limit.bit_length()) if 2**k <= limit]


@dataclass
class SearchResult:
    """The best layouts, and the number of others by outcome."""

    best_forecasts: list[StepForecast] = field(default_factory=list)
    """Best layouts, fastest first."""
    considered: int = 0
    illegal: Counter[str] = field(default_factory=Counter)
    """Number of illegal layouts by reason."""
    out_of_memory: Counter[str] = field(default_factory=Counter)
    """Number of layouts that do not fit, by the largest part of their memory."""
    missing_figures: Counter[str] = field(default_factory=Counter)
    """Number of layouts without a price, by the cluster figure that is missing."""
    simulated: int = 0
    pruned: int = 0
    """Number of layouts whose lower bound exceeds the slowest of `best_forecasts`."""
    smallest_pruned_bound: float | None = None
    """Smallest bound of a pruned layout, in seconds per step."""
    search_seconds: float = 0.0
    """Wall-clock seconds of the search."""
    simulation_cpu_seconds: float = 0.0
    """CPU seconds of the full simulations, without building programs, which several layouts share."""


def search_layouts(
    forecaster: StepForecaster,
    candidates: Iterator[tuple[ParallelLayout, ForecastRecipe]] | Sequence[tuple[ParallelLayout, ForecastRecipe]],
    global_batch: int,
    max_results: int = 5,
    *,
    exhaustive: bool = False,
    find_refusal: Callable[[ParallelLayout, ForecastRecipe], str | None] = lambda layout, recipe: None,
) -> SearchResult:
    """Return the `max_results` (at least 1) fastest layouts that are legal and fit; with `exhaustive` none is pruned.

    `find_refusal` returns why `train` would refuse a layout, or None.
    """
    began = time.perf_counter()
    result, priced = SearchResult(), []
    for layout, recipe in candidates:
        # In order of cost: legality is arithmetic, memory replays the program, and only the rest gets a bound.
        result.considered += 1
        try:
            if reason := find_layout_problem(forecaster, layout, global_batch) or find_refusal(layout, recipe):
                result.illegal[reason] += 1
            elif reason := find_memory_problem(forecaster, layout, recipe, global_batch):
                result.out_of_memory[reason] += 1
            else:
                priced.append((forecaster.step_seconds_lower_bound(layout, recipe, global_batch), layout, recipe))
        except ConfigError as refused:
            result.missing_figures[_unknown(refused)] += 1
    # Sorted by bound, the first bound above the slowest kept layout proves that no later layout can be better.
    priced.sort(key=lambda entry: entry[0])
    for number, (bound, layout, recipe) in enumerate(priced):
        is_full = len(result.best_forecasts) >= max_results
        if is_full and not exhaustive and bound > result.best_forecasts[-1].step_seconds:
            result.pruned = len(priced) - number
            result.smallest_pruned_bound = bound
            break
        _ = forecaster.step_program(layout, global_batch).simulator
        started = time.process_time()
        try:
            result.best_forecasts.append(forecaster.forecast(layout, recipe, global_batch))
        except ConfigError as refused:
            result.missing_figures[_unknown(refused)] += 1
            continue
        result.simulation_cpu_seconds += time.process_time() - started
        result.simulated += 1
        result.best_forecasts.sort(key=lambda forecast: forecast.step_seconds)
        del result.best_forecasts[max_results:]
    result.search_seconds = time.perf_counter() - began
    return result


def _unknown(refused: ConfigError) -> str:
    return f"{refused.problems[0].field} does not say enough"


def find_layout_problem(forecaster: StepForecaster, layout: ParallelLayout, global_batch: int) -> str | None:
    """Return why a layout is illegal, in one of a few phrases that are counted; None if it is legal."""
    topology, model = layout.topology, forecaster.model
    if model.n_routed_experts % topology.ep:
        return "experts do not divide over ep"
    # Node-limited routing assigns whole groups of experts to nodes (report §2.1.2), so each node needs equally many.
    if model.n_routed_experts % max(1, topology.nodes_per_ep_group):
        return "experts do not divide over nodes"
    if any(True for _ in topology.problems()):
        return "expert-parallel groups do not fill nodes evenly"
    if global_batch % (topology.dp * layout.micro_batch_size):
        return "the batch does not divide over ranks and micro-batches"
    count = layout.num_micro_batches(global_batch)
    for problem in schedule_problems(layout.schedule, topology.pp, count, layout.chunks_per_rank):
        words = {"ranks": "ranks do not suit the schedule", "micro_batches": "too few or odd micro-batches"}
        return f"{words.get(problem.field, problem.field)} ({layout.schedule})"
    if build_placement(layout.schedule, topology.pp, layout.chunks_per_rank).num_stages > model.num_hidden_layers:
        return "more stages than layers"
    return None


def find_memory_problem(
    forecaster: StepForecaster, layout: ParallelLayout, recipe: ForecastRecipe, global_batch: int
) -> str | None:
    """Return the largest part of the memory of a layout that does not fit; None if it fits."""
    limit = forecaster.cluster.memory_gb
    assert limit is not None
    limit *= 1e9
    # A sum over parameters; the simulation of activations below needs the whole program.
    static = forecaster.static_memory_bytes(layout, recipe)
    if static > limit:
        return "weights, gradients and optimizer alone"
    ranks = forecaster.memory_by_rank(layout, recipe, global_batch)
    worst = max(ranks, key=lambda memory: bytes_with_fragmentation(memory, recipe))
    if bytes_with_fragmentation(worst, recipe) <= limit:
        return None
    in_flight = worst.at_peak[MemoryKind.ACTIVATIONS] + worst.at_peak[MemoryKind.DELAYED_WGRAD]
    parts = {
        "weights, gradients and optimizer": worst.state.total,
        "activations in flight": in_flight,
        "one layer and the logits": worst.within_step - in_flight,
    }
    return f"mostly {max(parts, key=lambda part: parts[part])}"
