"""Partition of layers over stages: the one whose largest stage is smallest, or a given one."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ...comm.errors import Problem, raise_if_any


@dataclass(frozen=True)
class LayerPartition:
    """Consecutive layers of a model on consecutive stages."""

    layers_per_stage: tuple[int, ...]
    """Number of layers of each stage."""
    stage_costs: tuple[float, ...]
    """Cost of each stage, including the extras of the first and the last."""

    @property
    def layer_ranges(self) -> tuple[range, ...]:
        """Indices of each stage's layers."""
        ends = tuple(accumulate(self.layers_per_stage))
        return tuple(range(end - count, end) for end, count in zip(ends, self.layers_per_stage, strict=True))

    @property
    def imbalance(self) -> float:
        """Largest stage over the mean, minus 1."""
        mean = sum(self.stage_costs) / len(self.stage_costs)
        return max(self.stage_costs) / mean - 1 if mean else 0.0


def partition_layers(
    layer_costs: Sequence[float],
    stages: int,
    first_stage_extra: float = 0.0,
    last_stage_extra: float = 0.0,
    layers_per_stage: Sequence[int] | None = None,
) -> LayerPartition:
    """Partition layers of the given costs over `stages`, each with at least one layer.

    `first_stage_extra` and `last_stage_extra` are costs on top of the layers (embedding, head). `layers_per_stage`
    overrides the search. Raises `ConfigError` if there is no such partition.
    """
    raise_if_any(partition_problems(len(layer_costs), stages, layers_per_stage))
    loads = _Loads(layer_costs, stages, first_stage_extra, last_stage_extra)
    layers = tuple(layers_per_stage) if layers_per_stage is not None else _balance(loads)
    ends = (0, *accumulate(layers))
    scale = float(loads.denominator)
    exact = (loads.of(stage, ends[stage], ends[stage + 1]) for stage in range(stages))
    return LayerPartition(layers, tuple(load / scale for load in exact))


def partition_problems(layers: int, stages: int, layers_per_stage: Sequence[int] | None = None) -> Iterator[Problem]:
    """Yield each reason why `layers` cannot be partitioned over `stages`, or not by `layers_per_stage`."""
    if not 1 <= stages <= layers:
        yield Problem(
            "stages", stages, f"must be from 1 to {layers}: every stage holds at least one of {layers} layers"
        )
    if layers_per_stage is None:
        return
    shown = ",".join(map(str, layers_per_stage))
    if len(layers_per_stage) != stages:
        yield Problem(
            "layers_per_stage", shown, f"has {len(layers_per_stage)} stages; write the layers of each of the {stages}"
        )
    if sum(layers_per_stage) != layers:
        yield Problem("layers_per_stage", shown, f"has {sum(layers_per_stage)} layers in all; the model has {layers}")
    if empty := [str(stage) for stage, count in enumerate(layers_per_stage) if count < 1]:
        what = "stage" if len(empty) == 1 else "stages"
        yield Problem("layers_per_stage", shown, f"{what} {', '.join(empty)}: must hold at least 1 layer")


class _Loads:
    """Exact cost of any range of layers on any stage."""

    def __init__(self, costs: Sequence[float], stages: int, first: float, last: float) -> None:
        # As integers over a common denominator: rounding in sums of floats would decide between equal partitions.
        ratios = [float(cost).as_integer_ratio() for cost in (first, last, *costs)]
        self.denominator = math.lcm(*(below for _, below in ratios))
        exact = [above * (self.denominator // below) for above, below in ratios]
        self.layers, self.stages = len(costs), stages
        self._extra = [0] * stages
        self._extra[0] += exact[0]
        self._extra[-1] += exact[1]
        self._before = (0, *accumulate(exact[2:]))

    def of(self, stage: int, begin: int, end: int) -> int:
        """Return the cost of layers `begin` to `end` - 1 on `stage`."""
        return self._before[end] - self._before[begin] + self._extra[stage]


def _balance(loads: _Loads) -> tuple[int, ...]:
    """Return the layers of each stage: of the partitions with the smallest largest stage, the most even one."""
    # Even by the least sum of squares: dynamic programming from the last stage. The tuple after it decides between
    # equal ones for fewer layers on early stages, which in 1F1B keep their activations longest.
    smallest = _smallest_largest(loads)
    # best[begin] = (sum of squares, layers of each stage) for the stages from `stage` on, which hold layers from begin.
    best: dict[int, tuple[int, tuple[int, ...]]] = {loads.layers: (0, ())}
    for stage in reversed(range(loads.stages)):
        following, best = best, {}
        for begin in range(stage, loads.layers):
            options = [
                (squares + load**2, (end - begin, *layers))
                for end, (squares, layers) in following.items()
                if end > begin and (load := loads.of(stage, begin, end)) <= smallest
            ]
            if options:
                best[begin] = min(options)
    return best[0][1]


def _smallest_largest(loads: _Loads) -> int:
    """Return the cost of the largest stage in the best partition."""
    best = {loads.layers: 0}
    for stage in reversed(range(loads.stages)):
        following = best
        best = {
            begin: min(max(loads.of(stage, begin, end), rest) for end, rest in following.items() if end > begin)
            for begin in range(stage, loads.layers)
            if max(following) > begin
        }
    return best[0]
