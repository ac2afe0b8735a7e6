"""Predicted memory of each rank of a configured run, from its layout; no process is started."""

from dataclasses import dataclass
from functools import cached_property

import torch

from ...comm.host_transfer import STAGING_BYTES
from ...parallelism.pipeline.communication import P2PBatch, derive_p2p_batches
from ...parallelism.pipeline.liveness import peak_counts_between_instructions, peak_instructions
from ...parallelism.pipeline.program import PipelineProgram
from ..build import build_stage_layout
from ..config import RunConfig
from ..costs.operation_memory import MicroBatchShape
from ..model.stage_layout import StageLayout
from .layout import LayoutMemory, ShardedParameters
from .peak import RankMemory
from .workspace import WorkspaceBytes

PREDICTION_MARGIN = 0.05
"""Largest relative error of a prediction; tests compare predictions with measurements at this bound."""


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
        of_rank = self.program, pp_rank, self._p2p_batches[pp_rank]
        return self._layout(rows).predict_rank(
            pp_rank, peak_instructions(*of_rank), peak_counts_between_instructions(*of_rank)
        )

    def predict_host(self, pp_rank: int) -> HostMemoryBytes:
        """Predict the host memory of a rank of this pipeline rank, including the padding of buckets."""
        averages, on_cpu = self.config.optimizer.ema_decay is not None, self.device.type == "cpu"
        copied = average = 0.0
        layout = self._layout()
        wide = layout.workspace.batch.fp32_element_bytes
        for bucket in self._parameters.buckets_by_pp_rank[pp_rank]:
            copied += bucket.shard_elements * (wide * (2 if averages else 1) + 2 * layout.moment_bytes)
            average += bucket.shard_elements * wide
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
    def _p2p_batches(self) -> tuple[tuple[P2PBatch, ...], ...]:
        return derive_p2p_batches(self.program)

    @cached_property
    def _stages(self) -> StageLayout:
        return build_stage_layout(self.config)

    @property
    def _tokens(self) -> int:
        return self.config.schedule.micro_batch_size * self.config.training.sequence_length

    @cached_property
    def _parameters(self) -> ShardedParameters:
        return ShardedParameters(self._stages, self.config.topology, self._batch(None).is_narrow)

    def _batch(self, rows: float | None) -> MicroBatchShape:
        config = self.config
        return MicroBatchShape(
            config.schedule.micro_batch_size,
            config.training.sequence_length,
            config.precision.compute_dtype(self.device),
            on_cpu=self.device.type == "cpu",
            expert_rows_override=rows,
            fp8=config.precision.linear == "fp8",
            expert_block_rows=config.expert_block_rows,
        )

    def _layout(self, rows: float | None = None) -> LayoutMemory:
        config, policy = self.config, self.config.recompute.recompute_modules
        return LayoutMemory(
            self._parameters,
            WorkspaceBytes(config.model, self._batch(rows), policy, config.exchange, config.topology.ep),
            moment_bytes=config.optimizer.moments_dtype(config.precision.parameter_dtype()).itemsize,
            averages=config.optimizer.ema_decay is not None,
        )
