"""Memory of the ranks of one layout; `shoestring memory` and the planner both ask here."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property

from ...comm.communicator import REDUCE_STAGING_ELEMENTS
from ...comm.exchange.deepep_buffer import DeepEPBufferShape
from ...comm.topology import Topology
from ...parallelism.pipeline.chunk_walk import StageShape
from ...parallelism.pipeline.liveness import LiveCounts, LiveInstruction
from ...parallelism.pipeline.placement import StageLocation
from ...parallelism.zero.bucket import padded_bucket_length
from ...parallelism.zero.reduce import SQUARE_SUM_ELEMENTS
from ..costs.parameters import ModelPart, count_model_parts
from ..model.stage_layout import StageLayout
from ..optimizer.adamw import GPU_SLICE_ELEMENTS as ADAM_PIECE_ON_GPU
from ..optimizer.adamw import SLICE_ELEMENTS as ADAM_PIECE
from ..precision.fp8_tensors import fp8_weight_bytes
from .chunk import ChunkMemorySimulator
from .peak import NonAllocatorMemory, RankChunksMemory, RankMemory, StateBytes, predict_rank_memory
from .workspace import WorkspaceBytes

_FP64 = 8  # bytes


@dataclass(frozen=True)
class BucketSize:
    """Elements of one bucket of a rank, with padding."""

    elements: int
    zero_ranks: int
    """Ranks over which masters and moments are sharded (ZeRO-1)."""
    is_wide: bool
    """True if its weights are as wide as their masters in any compute dtype."""

    @property
    def shard_elements(self) -> float:
        """Elements of one rank's shard."""
        return self.elements / self.zero_ranks


@dataclass(frozen=True)
class ShardedParameters:
    """Parameters that each rank of a layout holds, by bucket as in `run.bucket_plan`."""

    stages: StageLayout
    topology: Topology
    splits_wide: bool
    """True if norms and routers, which are FP32 or wider, are in buckets of their own."""

    @cached_property
    def buckets_by_pp_rank(self) -> tuple[tuple[BucketSize, ...], ...]:
        """Buckets of a rank of each pipeline rank."""
        return tuple(tuple(self._buckets(pp_rank)) for pp_rank in range(self.topology.pp))

    @cached_property
    def fp8_bytes_by_pp_rank(self) -> tuple[float, ...]:
        """Bytes of the FP8 weights of FP8 training on a rank of each pipeline rank."""
        # Two copies of each weight: as it is for the forward, and transposed for the input gradient.
        return tuple(
            2.0 * sum(count * _fp8_bytes(part, self.topology.ep) for part, count, _ in self._parts(pp_rank))
            for pp_rank in range(self.topology.pp)
        )

    def _buckets(self, pp_rank: int) -> Iterator[BucketSize]:
        lengths: defaultdict[tuple[tuple[int, ...], bool, bool], list[int]] = defaultdict(list)
        holders: dict[tuple[int, ...], int] = {}
        for part, count, name in self._parts(pp_rank):
            users = self.stages.stages_using(name)
            holders[users] = len(self.stages.pp_ranks_holding(name))
            for each in part.parameters:
                elements = math.prod(each.shape_on_rank(self.topology.ep))
                lengths[users, each.is_expert, each.is_wide and self.splits_wide] += [elements] * count
        for (users, is_expert, is_wide), members in lengths.items():
            ranks = holders[users] * (self.topology.edp if is_expert else self.topology.dp)
            yield BucketSize(padded_bucket_length(members, ranks), ranks, is_wide)

    def _parts(self, pp_rank: int) -> Iterator[tuple[ModelPart, int, str]]:
        """Yield the parts that a rank holds, how often, and the start of their parameters' names."""
        parts, held = count_model_parts(self.stages.model), self.stages.stages_of_rank(pp_rank)
        for stage, shape in zip(held, stage_shapes_by_pp_rank(self.stages)[pp_rank], strict=True):
            if shape.dense_layers:
                yield parts.dense_layer, shape.dense_layers, f"layers.{stage.layers[0]}"
            if shape.moe_layers:
                yield parts.moe_layer, shape.moe_layers, f"layers.{stage.layers[-1]}"
        is_last = any(stage.is_last for stage in held)
        if any(stage.is_first for stage in held) or (is_last and self.stages.model.num_nextn_predict_layers):
            yield parts.embedding, 1, "embedding"
        if is_last:
            yield parts.head, 1, "head"
            yield parts.mtp, 1, "mtp"


@cache
def stage_shapes(stages: StageLayout) -> tuple[StageShape, ...]:
    """Return the contents of each stage."""
    dense = [sum(layer < stages.model.first_k_dense_replace for layer in layers) for layers in stages.stage_layers]
    last = len(dense) - 1
    return tuple(
        StageShape(dense[stage], len(layers) - dense[stage], stage == 0, stage == last)
        for stage, layers in enumerate(stages.stage_layers)
    )


@cache
def stage_shapes_by_pp_rank(stages: StageLayout) -> tuple[tuple[StageShape, ...], ...]:
    """Return the contents of the stages of each pipeline rank, by chunk."""
    shapes, placement = stage_shapes(stages), stages.placement
    return tuple(
        tuple(shapes[placement.stage_at(StageLocation(rank, chunk))] for chunk in range(placement.chunks_per_rank))
        for rank in range(placement.ranks)
    )


@dataclass(frozen=True)
class LayoutMemory:
    """Memory of the ranks of one layout."""

    parameters: ShardedParameters
    workspace: WorkspaceBytes
    moment_bytes: int
    """Bytes of each of the two Adam moments per parameter."""
    averages: bool
    """True if the optimizer keeps an average of the weights: on a CPU with the state, else in host memory."""

    def predict_rank(
        self, pp_rank: int, instructions: Iterable[LiveInstruction], between: Iterable[LiveCounts] = ()
    ) -> RankMemory:
        """Predict a rank of this pipeline rank, from the moments that may be its worst: in instructions and between."""
        return predict_rank_memory(
            self.state(pp_rank),
            _chunks(stage_shapes_by_pp_rank(self.parameters.stages)[pp_rank], self.workspace),
            instructions,
            between,
            self._optimizer_bytes(pp_rank),
            self.non_allocator,
        )

    def state(self, pp_rank: int) -> StateBytes:
        """Return the bytes that a rank of this pipeline rank holds from step to step.

        They are 6 + 8/d per parameter with BF16 weights and moments, sharded over d ranks.
        """
        # BF16: 2 for the weight and 4 for the FP32 gradient on every rank; 4 for the master and 2 + 2 for the moments,
        # sharded. A weight as wide as its master is the master, and counts once.
        batch, buckets = self.workspace.batch, self.parameters.buckets_by_pp_rank[pp_rank]
        wide = batch.fp32_element_bytes
        return StateBytes(
            weights=sum(each.elements * (wide if each.is_wide else batch.element_bytes) for each in buckets),
            fp8_weights=self.parameters.fp8_bytes_by_pp_rank[pp_rank] if batch.fp8 else 0.0,
            gradients=sum(each.elements * wide for each in buckets),
            masters=sum(each.shard_elements * wide for each in buckets if batch.is_narrow and not each.is_wide),
            moments=sum(each.shard_elements * 2 * self.moment_bytes for each in buckets),
            # On GPU ranks the average lies in host memory.
            average=sum(each.shard_elements * wide for each in buckets if self.averages and batch.on_cpu),
        )

    @cached_property
    def non_allocator(self) -> NonAllocatorMemory:
        """Bytes of a rank outside torch's allocator: CUDA context, and NCCL's or DeepEP's buffers."""
        if self.workspace.batch.on_cpu:
            return NonAllocatorMemory()
        # These bytes decide whether DeepSeek-V3 fits: with DeepEP's buffer (4.88 GB) the largest rank needs 87.2 GB of
        # an H800's 84.94, with `two_hop_fp8` 84.5.
        model, topology = self.workspace.config, self.parameters.topology
        buffer = DeepEPBufferShape(self.workspace.batch.tokens, model.hidden_size, model.num_experts_per_tok)
        return NonAllocatorMemory.for_exchange(
            self.workspace.exchange, buffer, topology.nodes_per_ep_group, topology.ep_ranks_per_node
        )

    def _optimizer_bytes(self, pp_rank: int) -> float:
        """Return the workspace at the end of a step, the largest over its three phases and all buckets."""
        # A maximum, not a sum: each phase frees its workspace before the next begins. The phases are squares of
        # gradients in FP64 for the norm; received gradients, staged on a CPU only; two moments in the master's dtype.
        on_cpu, wide, sizes = self.workspace.batch.on_cpu, self.workspace.batch.fp32_element_bytes, [0.0]
        for bucket in self.parameters.buckets_by_pp_rank[pp_rank]:
            sizes.append(min(bucket.shard_elements, SQUARE_SUM_ELEMENTS) * _FP64)
            if on_cpu and bucket.zero_ranks > 1:
                staged = min(bucket.shard_elements, REDUCE_STAGING_ELEMENTS // bucket.zero_ranks)
                sizes.append(staged * bucket.zero_ranks * wide)
            if self.moment_bytes < wide:
                sizes.append(2 * min(bucket.shard_elements, ADAM_PIECE if on_cpu else ADAM_PIECE_ON_GPU) * wide)
        return max(sizes)


# A search considers thousands of layouts (11,232 for DeepSeek-V3 on 2,048 GPUs), of which many share stages and
# workspace; the allocations of a chunk are simulated once for all of them.
@cache
def _chunks(shapes: tuple[StageShape, ...], workspace: WorkspaceBytes) -> RankChunksMemory:
    return RankChunksMemory([ChunkMemorySimulator(shape, workspace) for shape in shapes])


def _fp8_bytes(part: ModelPart, ep_size: int) -> int:
    return sum(fp8_weight_bytes(each.shape_on_rank(ep_size)) for each in part.parameters if each.is_fp8)
