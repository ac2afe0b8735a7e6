"""The memory that each rank of a configured run needs, by the layout that it would have; no process is started."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from ...comm.communicator import STAGED
from ...comm.host import STAGED_BYTES
from ...parallelism.pipeline.communication import P2PBatch, edges
from ...parallelism.pipeline.liveness import between, moments
from ...parallelism.pipeline.program import Program
from ...parallelism.zero.bucket import bucket_length
from ...parallelism.zero.reduce import PIECE
from ..build import largest_dispatch, stages_of
from ..config import RunConfig
from ..model.model import Model
from ..model.stage_layout import Stages
from ..optimizer.adamw import PIECE as ADAM_PIECE
from ..optimizer.adamw import PIECE_ON_GPU as ADAM_PIECE_ON_GPU
from ..precision.weights import blocks_bytes
from ..run.bucket_plan import BucketPlan, plan_buckets
from .activations import MicroBatch
from .buffers import ExchangeFormats
from .chunk import ChunkMemory, StageShape
from .peak import Chunks, Outside, RankMemory, rank_memory
from .state import Portion, StateBytes
from .working import Working

MARGIN = 0.05
"""By how much a prediction may be wrong: tests hold it to this."""

_FP64 = 8  # bytes


@dataclass(frozen=True)
class HostBytes:
    """What one rank holds on the host beside its processes and data; on a CPU, beside all that it computes with."""

    copy_for_saves: float
    """Of masters, moments and average, kept from the first save on."""
    average: float = 0.0
    """Of the weights, with what is staged on the way from a GPU. On a CPU it is part of the state."""


@dataclass(frozen=True)
class RunMemory:
    """Of a run on such devices."""

    config: RunConfig
    device: torch.device

    def of(self, pp_rank: int, rows: float | None = None) -> RankMemory:
        """One rank of this pipeline rank, when each of its layers receives `rows`; None: its even share."""
        program = self.program
        chunks = Chunks([ChunkMemory(shape, self._working(rows)) for shape in self._shapes(pp_rank)])
        plans = list(self._plans(pp_rank))
        state = StateBytes.of(self._portions(plans), self._fp8_weights(pp_rank))
        of_rank = program, pp_rank, self._commits[pp_rank]
        worst, held = moments(*of_rank), between(*of_rank)
        return rank_memory(state, chunks, worst, held, self._update(plans), self._outside)

    def on_host(self, pp_rank: int) -> HostBytes:
        """One rank of this pipeline rank, padding at the end of buckets included."""
        averages, on_cpu = self.config.optimizer.ema_decay is not None, self.device.type == "cpu"
        copied = average = 0.0
        for portion in self._portions(list(self._plans(pp_rank))):
            shard = portion.elements / portion.copies
            copied += shard * (portion.wide * (2 if averages else 1) + 2 * portion.moment)
            average += shard * portion.wide
        return HostBytes(copied, average + STAGED_BYTES if averages and not on_cpu else 0.0)

    @property
    def most_rows(self) -> int:
        """That routing can send to one rank: every token of the expert-parallel group, once for each of its experts."""
        model, ranks = self.config.model, self.config.topology.ep
        return self._tokens * ranks * min(model.num_experts_per_tok, model.n_routed_experts // ranks)

    def rows_if_skewed(self, ep_rank: int) -> float:
        """That this rank of an expert-parallel group receives when its first one has `most_rows`."""
        ranks = self.config.topology.ep
        left = self._tokens * ranks * self.config.model.num_experts_per_tok - self.most_rows
        return self.most_rows if ep_rank == 0 else left / (ranks - 1)

    def bound(self, pp_rank: int) -> float:
        """Bytes that no routing can exceed, with `MARGIN` for what is not counted."""
        return (1 + MARGIN) * self.of(pp_rank, self.most_rows).total

    @cached_property
    def program(self) -> Program:
        """Of one step."""
        return self._stages.program(self.config.micro_batches)

    @cached_property
    def _commits(self) -> tuple[tuple[P2PBatch, ...], ...]:
        return edges(self.program)

    @cached_property
    def _stages(self) -> Stages:
        return stages_of(self.config)

    @cached_property
    def _models(self) -> dict[int, Model]:
        return {}

    @property
    def _outside(self) -> Outside:
        if self.device.type == "cpu":
            return Outside()
        topology = self.config.topology
        shape = largest_dispatch(self.config)
        return Outside.of(self.config.exchange, shape, topology.ep_nodes, topology.ep_node_size)

    @property
    def _dtype(self) -> torch.dtype:
        return self.config.precision.compute_dtype(self.device)

    @property
    def _tokens(self) -> int:
        return self.config.schedule.micro_batch * self.config.training.sequence_length

    def _model(self, pp_rank: int) -> Model:
        """The share of such a rank, without storage."""
        if pp_rank not in self._models:
            share = self._stages.share(self.config.topology, pp_rank * self.config.topology.dp)
            with torch.device("meta"):
                model = Model(self.config.model, share)
            self._models[pp_rank] = model.to(self.config.precision.parameter_dtype())
        return self._models[pp_rank]

    def _shapes(self, pp_rank: int) -> Iterator[StageShape]:
        for stage in self._stages.chunks(pp_rank):
            dense = sum(layer < self.config.model.first_k_dense_replace for layer in stage.layers)
            yield StageShape(dense, len(stage.layers) - dense, stage.is_first, stage.is_last)

    def _working(self, rows: float | None) -> Working:
        config = self.config
        batch = MicroBatch(
            config.schedule.micro_batch,
            config.training.sequence_length,
            self._dtype,
            on_cpu=self.device.type == "cpu",
            rows=rows,
            fp8=config.precision.linear == "fp8",
            block=config.expert_rows,
        )
        experts = config.model.n_routed_experts // config.topology.ep
        wire = ExchangeFormats.of(config.exchange, config.topology.ep)
        return Working(config.model, batch, config.recompute.policy, wire, experts)

    def _plans(self, pp_rank: int) -> Iterator[BucketPlan]:
        yield from plan_buckets(self._model(pp_rank), self._stages, self.program, self._dtype)

    def _ranks(self, plan: BucketPlan) -> int:
        """That share the bucket."""
        topology = self.config.topology
        return len(plan.holders) * (topology.edp if plan.is_expert else topology.dp)

    def _portions(self, plans: list[BucketPlan]) -> Iterator[Portion]:
        optimizer = self.config.optimizer
        for plan in plans:
            wide = torch.promote_types(plan.masters, torch.float32).itemsize
            yield Portion(
                elements=bucket_length(plan.members, self._ranks(plan)),
                copies=self._ranks(plan),
                weight=plan.weights.itemsize,
                wide=wide,
                moment=optimizer.moments_dtype(plan.masters).itemsize,
                averaged=optimizer.ema_decay is not None and self.device.type == "cpu",
            )

    def _fp8_weights(self, pp_rank: int) -> float:
        if self.config.precision.linear != "fp8":
            return 0.0
        return 2.0 * sum(blocks_bytes(weight.shape) for weight in self._model(pp_rank).fp8_weights())

    def _update(self, plans: list[BucketPlan]) -> float:
        """At the end of a step: rows of gradients that arrive to be added, squares for the norm, or wider moments."""
        on_cpu = self.device.type == "cpu"
        sizes = [0.0]
        for portion in self._portions(plans):
            shard = portion.elements / portion.copies
            sizes.append(min(shard, PIECE) * _FP64)
            if on_cpu and portion.copies > 1:
                sizes.append(min(shard, STAGED // portion.copies) * portion.copies * portion.wide)
            if portion.moment < portion.wide:
                sizes.append(2 * min(shard, ADAM_PIECE if on_cpu else ADAM_PIECE_ON_GPU) * portion.wide)
        return max(sizes)
