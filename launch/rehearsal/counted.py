"""Launches and bytes, averaged over what the rehearsed ranks have alike: a layer's phases in one micro-batch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ...parallelism.pipeline.program import Op
from ...trainer.config import RunConfig
from ...trainer.model.stage_layout import Stages
from ...trainer.model.tape import StageSpec
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


def has_weight_gradients(counts: Sequence[Count]) -> bool:
    """Whether a MoE layer's counts hold its weight gradients, which name no layer: a rank of MoE layers alone knows."""
    return any(count.of == MOE and count.phase in _CHUNK_PHASES for count in counts)


class _Owners:
    """What the launches of each rank belong to, and how often there is such a thing."""

    def __init__(self, config: RunConfig, stages: Stages, logs: Sequence[RankLog]) -> None:
        self._dense_layers = config.model.first_k_dense_replace
        self._plain: set[int] = set()
        """Ranks that have MoE layers and nothing else."""
        self.times: Counter[str] = Counter({STEP: len(logs)})
        numbers = {log.micro_batches for log in logs}
        micro_batches = {number: stages.program(number).micro_batches_of(0) for number in numbers}
        for log in logs:
            chunks = stages.chunks(log.pp_rank)
            layers = {kind: n * micro_batches[log.micro_batches] for kind, n in _layers(config, chunks).items() if n}
            self.times.update(layers)
            if set(layers) == {MOE} and not any(chunk.is_first or chunk.is_last for chunk in chunks):
                self._plain.add(log.rank)
                self.times[_UNLABELED] += layers[MOE]

    def of(self, rank: int, row: Launches) -> str:
        """Return a key of `times`."""
        if row.layer:
            name, _, number = row.layer.rpartition("_")
            if name != "layer":
                return MTP
            return DENSE if int(number) < self._dense_layers else MOE
        if row.phase in _DENSE_PHASES:
            return DENSE
        return _UNLABELED if row.phase in _CHUNK_PHASES and rank in self._plain else STEP


_UNLABELED = "launches of MoE layers that name no layer"
_DENSE_PHASES = frozenset({"dense(F)", "dense(B)"})
_CHUNK_PHASES = frozenset({*Op, "attn(W)", "mlp(W)"})
"""Weight gradients, and what a chunk does between the phases of its layers. On a rank that has MoE layers alone all of
it is theirs."""


def _layers(config: RunConfig, chunks: Sequence[StageSpec]) -> dict[str, int]:
    """Return how many layers of each kind the chunks of a rank have."""
    layers = [layer for chunk in chunks for layer in chunk.layers]
    dense = sum(layer < config.model.first_k_dense_replace for layer in layers)
    return {
        DENSE: dense,
        MOE: len(layers) - dense,
        MTP: config.model.num_nextn_predict_layers * any(c.is_last for c in chunks),
    }


def _means(
    config: RunConfig, stages: Stages, logs: Sequence[RankLog], key_of: Callable[[Launches], Key]
) -> dict[tuple[str, Key], tuple[float, float]]:
    """Return launches and bytes by what is counted for and key."""
    owners = _Owners(config, stages, logs)
    sums: defaultdict[tuple[str, Key], list[int]] = defaultdict(lambda: [0, 0])
    for log in logs:
        for row in log.launches:
            total = sums[owners.of(log.rank, row), key_of(row)]
            total[0] += row.launches
            total[1] += row.bytes
    means: defaultdict[tuple[str, Key], tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for (owner, key), (launches, size) in sums.items():
        of, times = MOE if owner == _UNLABELED else owner, owners.times[owner]
        means[of, key] = means[of, key][0] + launches / times, means[of, key][1] + size / times
    return dict(means)
