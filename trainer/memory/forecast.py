"""Predicted memory of each rank of a configured run, from its layout; no process is started."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from ...comm.communicator import REDUCE_STAGING_ELEMENTS
from ...comm.host_transfer import STAGING_BYTES
from ...parallelism.pipeline.communication import P2PBatch, derive_p2p_batches
from ...parallelism.pipeline.liveness import peak_counts_between_instructions, peak_instructions
from ...parallelism.pipeline.program import PipelineProgram
from ...parallelism.zero.bucket import padded_bucket_length
from ...parallelism.zero.reduce import SQUARE_SUM_ELEMENTS
from ..build import build_stage_layout, dispatch_buffer_shape
from ..config import RunConfig
from ..costs.operation_memory import MicroBatchShape
from ..model.model import Model
from ..model.stage_layout import StageLayout
from ..optimizer.adamw import GPU_SLICE_ELEMENTS as ADAM_PIECE_ON_GPU
from ..optimizer.adamw import SLICE_ELEMENTS as ADAM_PIECE
from ..precision.fp8_tensors import fp8_weight_bytes
from ..run.bucket_plan import BucketPlan, plan_buckets
from .chunk import ChunkMemorySimulator, StageShape
from .peak import NonAllocatorMemory, RankChunksMemory, RankMemory, predict_rank_memory
from .state import ParameterGroup, StateBytes
from .workspace import WorkspaceBytes

PREDICTION_MARGIN = 0.05
"""Largest relative error of a prediction; tests compare predictions with measurements at this bound."""

_FP64 = 8  # bytes


@dataclass(frozen=True)
class HostMemoryBytes:
    """Host memory of one rank without process and data; on a CPU, also without its state and activations."""

    copy_for_saves: float
    """Bytes of the checkpoint copy of masters, moments and average, kept from the first save on."""
    average: float = 0.0
    """Bytes of the weight average and of its staging buffer; 0 on a CPU, where the average is part of the state."""


@dataclass(frozen=True)
class MemoryPredictor:
    """Predictor of the memory of a run's ranks on devices of the type of `device`."""

    config: RunConfig
    device: torch.device

    def predict_rank(self, pp_rank: int, rows: float | None = None) -> RankMemory:
        """Predict a rank of this pipeline rank if its experts receive `rows` rows per layer; None: even routing."""
        program = self.program
        chunks = RankChunksMemory([ChunkMemorySimulator(shape, self._working(rows)) for shape in self._shapes(pp_rank)])
        plans = list(self._plans(pp_rank))
        state = StateBytes.from_groups(self._portions(plans), self._fp8_weights(pp_rank))
        of_rank = program, pp_rank, self._commits[pp_rank]
        worst, held = peak_instructions(*of_rank), peak_counts_between_instructions(*of_rank)
        return predict_rank_memory(state, chunks, worst, held, self._update(plans), self._outside)

    def predict_host(self, pp_rank: int) -> HostMemoryBytes:
        """Predict the host memory of a rank of this pipeline rank, including the padding of buckets."""
        averages, on_cpu = self.config.optimizer.ema_decay is not None, self.device.type == "cpu"
        copied = average = 0.0
        for portion in self._portions(list(self._plans(pp_rank))):
            shard = portion.elements / portion.zero_ranks
            copied += shard * (portion.master_bytes * (2 if averages else 1) + 2 * portion.moment_bytes)
            average += shard * portion.master_bytes
        return HostMemoryBytes(copied, average + STAGING_BYTES if averages and not on_cpu else 0.0)

    @property
    def worst_case_expert_rows(self) -> int:
        """Largest number of rows that routing can send to one rank in a layer."""
        # Every token of the expert-parallel group, as often as it has experts: at most K, at most those of the rank.
        model, ranks = self.config.model, self.config.topology.ep
        return self._tokens * ranks * min(model.num_experts_per_tok, model.n_routed_experts // ranks)

    def skewed_expert_rows(self, ep_rank: int) -> float:
        """Return the rows of this expert-parallel rank if the group's first rank has `worst_case_expert_rows`."""
        ranks = self.config.topology.ep
        left = self._tokens * ranks * self.config.model.num_experts_per_tok - self.worst_case_expert_rows
        return self.worst_case_expert_rows if ep_rank == 0 else left / (ranks - 1)

    def upper_bound_bytes(self, pp_rank: int) -> float:
        """Return bytes that no routing exceeds, with `PREDICTION_MARGIN` for what is not counted."""
        return (1 + PREDICTION_MARGIN) * self.predict_rank(pp_rank, self.worst_case_expert_rows).total

    @cached_property
    def program(self) -> PipelineProgram:
        """Pipeline program of one step."""
        return self._stages.build_checked_program(self.config.num_micro_batches)

    @cached_property
    def _commits(self) -> tuple[tuple[P2PBatch, ...], ...]:
        return derive_p2p_batches(self.program)

    @cached_property
    def _stages(self) -> StageLayout:
        return build_stage_layout(self.config)

    @cached_property
    def _models(self) -> dict[int, Model]:
        return {}

    @property
    def _outside(self) -> NonAllocatorMemory:
        if self.device.type == "cpu":
            return NonAllocatorMemory()
        topology = self.config.topology
        shape = dispatch_buffer_shape(self.config)
        return NonAllocatorMemory.for_exchange(
            self.config.exchange, shape, topology.nodes_per_ep_group, topology.ep_ranks_per_node
        )

    @property
    def _dtype(self) -> torch.dtype:
        return self.config.precision.compute_dtype(self.device)

    @property
    def _tokens(self) -> int:
        return self.config.schedule.micro_batch_size * self.config.training.sequence_length

    def _model(self, pp_rank: int) -> Model:
        """Return the model shard of a rank of this pipeline rank, on the meta device."""
        if pp_rank not in self._models:
            share = self._stages.model_shard(self.config.topology, pp_rank * self.config.topology.dp)
            with torch.device("meta"):
                model = Model(self.config.model, share)
            self._models[pp_rank] = model.to(self.config.precision.parameter_dtype())
        return self._models[pp_rank]

    def _shapes(self, pp_rank: int) -> Iterator[StageShape]:
        for stage in self._stages.stages_of_rank(pp_rank):
            dense = sum(layer < self.config.model.first_k_dense_replace for layer in stage.layers)
            yield StageShape(dense, len(stage.layers) - dense, stage.is_first, stage.is_last)

    def _working(self, rows: float | None) -> WorkspaceBytes:
        config = self.config
        batch = MicroBatchShape(
            config.schedule.micro_batch_size,
            config.training.sequence_length,
            self._dtype,
            on_cpu=self.device.type == "cpu",
            expert_rows_override=rows,
            fp8=config.precision.linear == "fp8",
            expert_block_rows=config.expert_block_rows,
        )
        policy = config.recompute.recompute_modules
        return WorkspaceBytes(config.model, batch, policy, config.exchange, config.topology.ep)

    def _plans(self, pp_rank: int) -> Iterator[BucketPlan]:
        yield from plan_buckets(self._model(pp_rank), self._stages, self.program, self._dtype)

    def _ranks(self, plan: BucketPlan) -> int:
        """Return the number of ranks over which the bucket is sharded."""
        topology = self.config.topology
        return len(plan.holding_pp_ranks) * (topology.edp if plan.is_expert else topology.dp)

    def _portions(self, plans: list[BucketPlan]) -> Iterator[ParameterGroup]:
        optimizer = self.config.optimizer
        for plan in plans:
            wide = torch.promote_types(plan.master_dtype, torch.float32).itemsize
            yield ParameterGroup(
                elements=padded_bucket_length(plan.members, self._ranks(plan)),
                zero_ranks=self._ranks(plan),
                weight_bytes=plan.weight_dtype.itemsize,
                master_bytes=wide,
                moment_bytes=optimizer.moments_dtype(plan.master_dtype).itemsize,
                has_ema=optimizer.ema_decay is not None and self.device.type == "cpu",
            )

    def _fp8_weights(self, pp_rank: int) -> float:
        if self.config.precision.linear != "fp8":
            return 0.0
        # Two copies of each weight: as it is for the forward, and transposed for the input gradient.
        return 2.0 * sum(fp8_weight_bytes(weight.shape) for weight in self._model(pp_rank).fp8_weights())

    def _update(self, plans: list[BucketPlan]) -> float:
        """Return the workspace at the end of a step, the largest over its three phases and all buckets."""
        # A maximum, not a sum: each phase frees its workspace before the next begins. The phases are squares of
        # gradients in FP64 for the norm; received gradients, staged on a CPU only; two moments in the master's dtype.
        on_cpu = self.device.type == "cpu"
        sizes = [0.0]
        for portion in self._portions(plans):
            shard = portion.elements / portion.zero_ranks
            sizes.append(min(shard, SQUARE_SUM_ELEMENTS) * _FP64)
            if on_cpu and portion.zero_ranks > 1:
                sizes.append(
                    min(shard, REDUCE_STAGING_ELEMENTS // portion.zero_ranks)
                    * portion.zero_ranks
                    * portion.master_bytes
                )
            if portion.moment_bytes < portion.master_bytes:
                sizes.append(2 * min(shard, ADAM_PIECE if on_cpu else ADAM_PIECE_ON_GPU) * portion.master_bytes)
        return max(sizes)
