"""Kernel launches and bytes per phase of a layer in one micro-batch, averaged over the rehearsed ranks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ...parallelism.pipeline.program import Op
from ...trainer.config import RunConfig
from ...trainer.model.forward_context import StageSpec
from ...trainer.model.stage_layout import StageLayout
from .log import KernelLaunches, RankLog

MOE_LAYER, DENSE_LAYER, MTP_MODULE, WHOLE_STEP = "MoE layer", "dense layer", "MTP module", "step"

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class MeanKernelLaunches:
    """Mean over layers, micro-batches and ranks; for launches that belong to no layer, of a whole step over ranks."""

    owner: str
    """`MoE layer`, `dense layer`, `MTP module` or `step`."""
    phase: str
    stream: str
    operation: str
    """Empty for the sum over all operations."""
    code_location: str
    launches: float
    bytes: float


def mean_launches_by_phase(config: RunConfig, stages: StageLayout, logs: Sequence[RankLog]) -> list[MeanKernelLaunches]:
    """Return the means by phase and stream, in the order of the first launch."""
    found = _means(config, stages, logs, lambda row: (row.phase, row.stream))
    return [MeanKernelLaunches(owner, phase, stream, "", "", *mean) for (owner, (phase, stream)), mean in found.items()]


def mean_launches_by_operation(
    config: RunConfig, stages: StageLayout, logs: Sequence[RankLog]
) -> list[MeanKernelLaunches]:
    """Return the means by operation and code location, those that move the most bytes first."""
    found = _means(config, stages, logs, lambda row: (row.phase, row.stream, row.operation, row.code_location))
    counts = [MeanKernelLaunches(owner, *key, *mean) for (owner, key), mean in found.items()]
    return sorted(counts, key=lambda count: -count.bytes)


def moe_layer_totals(counts: Sequence[MeanKernelLaunches]) -> dict[str, tuple[float, float]]:
    """Return launches and bytes by stream of an MoE layer's forward and backward of one micro-batch."""
    sums: defaultdict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for count in counts:
        if count.owner == MOE_LAYER:
            launches, size = sums[count.stream]
            sums[count.stream] = launches + count.launches, size + count.bytes
    return dict(sums)


def has_weight_gradients(counts: Sequence[MeanKernelLaunches]) -> bool:
    """Return whether an MoE layer's counts include its weight gradients."""
    # Their spans name no layer, so they are known only from a rank that holds nothing but MoE layers.
    return any(count.owner == MOE_LAYER and count.phase in _CHUNK_PHASES for count in counts)


class _Owners:
    """Assignment of each rank's launches to a kind of layer or to the step, and the number of each kind."""

    def __init__(self, config: RunConfig, stages: StageLayout, logs: Sequence[RankLog]) -> None:
        self._dense_layers = config.model.first_k_dense_replace
        self._plain: set[int] = set()
        """Ranks that hold only MoE layers."""
        self.occurrences: Counter[str] = Counter({WHOLE_STEP: len(logs)})
        numbers = {log.micro_batches for log in logs}
        micro_batches = {number: stages.build_checked_program(number).micro_batches_in_chunk(0) for number in numbers}
        for log in logs:
            chunks = stages.stages_of_rank(log.pp_rank)
            layers = {kind: n * micro_batches[log.micro_batches] for kind, n in _layers(config, chunks).items() if n}
            self.occurrences.update(layers)
            if set(layers) == {MOE_LAYER} and not any(chunk.is_first or chunk.is_last for chunk in chunks):
                self._plain.add(log.rank)
                self.occurrences[_UNLABELED] += layers[MOE_LAYER]

    def owner_of(self, rank: int, row: KernelLaunches) -> str:
        """Return a key of `occurrences`."""
        if row.layer:
            name, _, number = row.layer.rpartition("_")
            if name != "layer":
                return MTP_MODULE
            return DENSE_LAYER if int(number) < self._dense_layers else MOE_LAYER
        if row.phase in _DENSE_PHASES:
            return DENSE_LAYER
        return _UNLABELED if row.phase in _CHUNK_PHASES and rank in self._plain else WHOLE_STEP


_UNLABELED = "launches of MoE layers that name no layer"
_DENSE_PHASES = frozenset({"dense(F)", "dense(B)"})
_CHUNK_PHASES = frozenset({*Op, "attn(W)", "mlp(W)"})
"""Weight gradients, and the operations of a chunk between the phases of its layers. On a rank that holds only MoE
layers they all belong to MoE layers."""


def _layers(config: RunConfig, chunks: Sequence[StageSpec]) -> dict[str, int]:
    """Return the number of layers of each kind in the chunks of a rank."""
    layers = [layer for chunk in chunks for layer in chunk.layers]
    dense = sum(layer < config.model.first_k_dense_replace for layer in layers)
    return {
        DENSE_LAYER: dense,
        MOE_LAYER: len(layers) - dense,
        MTP_MODULE: config.model.num_nextn_predict_layers * any(c.is_last for c in chunks),
    }


def _means(
    config: RunConfig, stages: StageLayout, logs: Sequence[RankLog], key_of: Callable[[KernelLaunches], Key]
) -> dict[tuple[str, Key], tuple[float, float]]:
    """Return mean launches and bytes by owner and key."""
    owners = _Owners(config, stages, logs)
    sums: defaultdict[tuple[str, Key], list[int]] = defaultdict(lambda: [0, 0])
    for log in logs:
        for row in log.launches:
            total = sums[owners.owner_of(log.rank, row), key_of(row)]
            total[0] += row.launches
            total[1] += row.bytes
    means: defaultdict[tuple[str, Key], tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for (owner, key), (launches, size) in sums.items():
        of, times = MOE_LAYER if owner == _UNLABELED else owner, owners.occurrences[owner]
        means[of, key] = means[of, key][0] + launches / times, means[of, key][1] + size / times
    return dict(means)
