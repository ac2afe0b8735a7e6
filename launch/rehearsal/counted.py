"""Launches and bytes, averaged over what the rehearsed ranks have alike: a layer's phases in one micro-batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ...trainer.config import RunConfig
from ...trainer.stages import Stages
from .log import Launches, RankLog

MOE, DENSE, MTP, STEP = "MoE layer", "dense layer", "MTP module", "step"

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Count:
    """The mean over layers, micro-batches and ranks; of what belongs to no layer, over ranks, of a whole step."""

    of: str
    """`MoE layer`, `dense layer`, `MTP module` or `step`."""
    phase: str
    stream: str
    operation: str
    """Empty where all operations are taken together."""
    place: str
    launches: float
    bytes: float


def by_phase(config: RunConfig, stages: Stages, logs: Sequence[RankLog]) -> list[Count]:
    """Return the phases of a layer in one micro-batch, stream by stream, in the order of their first launch."""
    found = _means(config, stages, logs, lambda row: (row.phase, row.stream))
    return [Count(of, phase, stream, "", "", *mean) for (of, (phase, stream)), mean in found.items()]


def by_operation(config: RunConfig, stages: Stages, logs: Sequence[RankLog]) -> list[Count]:
    """Return every kind of operation at every place, those that move the most bytes first."""
    found = _means(config, stages, logs, lambda row: (row.phase, row.stream, row.operation, row.place))
    counts = [Count(of, *key, *mean) for (of, key), mean in found.items()]
    return sorted(counts, key=lambda count: -count.bytes)


def layer_pair(counts: Sequence[Count]) -> dict[str, tuple[float, float]]:
    """Return launches and bytes by stream of a MoE layer's whole forward and backward in one micro-batch each."""
    sums: defaultdict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for count in counts:
        if count.of == MOE:
            launches, size = sums[count.stream]
            sums[count.stream] = launches + count.launches, size + count.bytes
    return dict(sums)


def _means(
    config: RunConfig, stages: Stages, logs: Sequence[RankLog], key_of: Callable[[Launches], Key]
) -> dict[tuple[str, Key], tuple[float, float]]:
    """Return launches and bytes by what is counted for and key."""
    times = _times(config, stages, logs)
    sums: dict[tuple[str, Key], list[float]] = {}
    for log in logs:
        for row in log.launches:
            total = sums.setdefault((_kind(config, row.layer), key_of(row)), [0.0, 0.0])
            total[0] += row.launches
            total[1] += row.bytes
    return {key: (total[0] / times[key[0]], total[1] / times[key[0]]) for key, total in sums.items()}


def _times(config: RunConfig, stages: Stages, logs: Sequence[RankLog]) -> dict[str, int]:
    """Return how many micro-batches all layers of a kind see on all rehearsed ranks; of `step`, how many ranks."""
    layers: dict[str, set[tuple[int, str]]] = {MOE: set(), DENSE: set(), MTP: set(), STEP: set()}
    for log in logs:
        for row in log.launches:
            if row.layer:
                layers[_kind(config, row.layer)].add((log.rank, row.layer))
    per_layer = {number: stages.program(number).micro_batches_of(0) for number in {log.micro_batches for log in logs}}
    seen = {log.rank: per_layer[log.micro_batches] for log in logs}
    times = {kind: sum(seen[rank] for rank, _ in found) for kind, found in layers.items()}
    return times | {STEP: len(logs)}


def _kind(config: RunConfig, layer: str) -> str:
    if not layer:
        return STEP
    name, _, number = layer.rpartition("_")
    if name != "layer":
        return MTP
    return DENSE if int(number) < config.model.dense_layers else MOE
