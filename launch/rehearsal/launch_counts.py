"""Kernel launches and bytes per phase of a layer in one micro-batch, averaged over the rehearsed ranks."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...parallelism.pipeline.program import Op
from ...trainer.build import build_stage_layout
from ...trainer.config import RunConfig
from ...trainer.model.forward_context import StageSpec
from .log import KernelLaunches, RankLog

OWNERS = "MoE layer", "dense layer", "MTP module", "step"
MOE_LAYER, DENSE_LAYER, MTP_MODULE, WHOLE_STEP = OWNERS


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

    def __init__(self, config: RunConfig, logs: Sequence[RankLog]) -> None:
        stages = build_stage_layout(config)
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


def mean_launches(
    config: RunConfig, logs: Sequence[RankLog], key_of: Callable[[KernelLaunches], tuple[str, str, str, str]]
) -> list[MeanKernelLaunches]:
    """Return mean launches and bytes by owner and key, which is (phase, stream, operation, code location)."""
    owners = _Owners(config, logs)
    sums: defaultdict[tuple[str, tuple[str, str, str, str]], list[int]] = defaultdict(lambda: [0, 0])
    for log in logs:
        for row in log.launches:
            total = sums[owners.owner_of(log.rank, row), key_of(row)]
            total[0] += row.launches
            total[1] += row.bytes
    means: defaultdict[tuple[str, tuple[str, str, str, str]], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for (owner, key), (launches, size) in sums.items():
        mean = means[MOE_LAYER if owner == _UNLABELED else owner, key]
        mean[0] += launches / owners.occurrences[owner]
        mean[1] += size / owners.occurrences[owner]
    return [MeanKernelLaunches(owner, *key, *mean) for (owner, key), mean in means.items()]
