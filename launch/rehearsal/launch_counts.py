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


_UNLABELED = "launches of MoE layers that name no layer"
_DENSE_PHASES = frozenset({"dense(F)", "dense(B)"})
_CHUNK_PHASES = frozenset({*Op, "attn(W)", "mlp(W)"})
"""Weight gradients, and the operations of a chunk between the phases of its layers. On a rank that holds only MoE
layers they all belong to MoE layers."""


def _occurrences(config: RunConfig, logs: Sequence[RankLog]) -> tuple[Counter[str], set[int]]:
    """Return the number of each kind of layer, and the ranks that hold only MoE layers."""
    stages, plain = build_stage_layout(config), set[int]()
    occurrences: Counter[str] = Counter({WHOLE_STEP: len(logs)})
    numbers = {log.micro_batches for log in logs}
    micro_batches = {number: stages.build_checked_program(number).micro_batches_in_chunk(0) for number in numbers}
    for log in logs:
        chunks = stages.stages_of_rank(log.pp_rank)
        layers = {kind: n * micro_batches[log.micro_batches] for kind, n in _layers(config, chunks).items() if n}
        occurrences.update(layers)
        if set(layers) == {MOE_LAYER} and not any(chunk.is_first or chunk.is_last for chunk in chunks):
            plain.add(log.rank)
            occurrences[_UNLABELED] += layers[MOE_LAYER]
    return occurrences, plain


def _owner(row: KernelLaunches, dense_layers: int, *, is_plain: bool) -> str:
    """Return the key of `_occurrences` to which a rank's launches belong; `is_plain`: it holds only MoE layers."""
    if row.layer:
        name, _, number = row.layer.rpartition("_")
        if name != "layer":
            return MTP_MODULE
        return DENSE_LAYER if int(number) < dense_layers else MOE_LAYER
    if row.phase in _DENSE_PHASES:
        return DENSE_LAYER
    return _UNLABELED if row.phase in _CHUNK_PHASES and is_plain else WHOLE_STEP


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
    occurrences, plain = _occurrences(config, logs)
    sums: defaultdict[tuple[str, tuple[str, str, str, str]], list[int]] = defaultdict(lambda: [0, 0])
    for log in logs:
        for row in log.launches:
            owner = _owner(row, config.model.first_k_dense_replace, is_plain=log.rank in plain)
            total = sums[owner, key_of(row)]
            total[0] += row.launches
            total[1] += row.bytes
    means: defaultdict[tuple[str, tuple[str, str, str, str]], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for (owner, key), (launches, size) in sums.items():
        mean = means[MOE_LAYER if owner == _UNLABELED else owner, key]
        mean[0] += launches / occurrences[owner]
        mean[1] += size / occurrences[owner]
    return [MeanKernelLaunches(owner, *key, *mean) for (owner, key), mean in means.items()]
