"""What one rank of a training run holds, made from the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ..comm.async_comm import AsyncCommunicator, CollectiveOrderCheck, build_async_communicator
from ..comm.exchange.api import TokenExchange
from ..comm.exchange.deepep_buffer import DeepEPBufferShape
from ..comm.exchange.factory import build_token_exchange
from ..comm.groups import ProcessGroups
from ..comm.p2p import P2PChannel
from ..comm.streams import DeviceStreams, get_device_streams
from ..comm.trace import NULL_RECORDER, SpanRecorder, TimelineTrack
from ..comm.traffic import TrafficCounter
from ..parallelism.pipeline.executor import PipelineExecutor, build_p2p_channels
from ..parallelism.pipeline.liveness import first_use, first_use_on_any_rank, last_use
from ..parallelism.pipeline.placement import Direction
from ..parallelism.pipeline.program import PipelineProgram
from ..parallelism.pipeline.schedules.registry import build_forward_program
from ..parallelism.zero.bucket import Bucket
from ..parallelism.zero.optimizer import ShardedOptimizer
from ..parallelism.zero.reduce import GradientReducer
from .checkpoint.pieces import TensorPiece
from .checkpoint.saver import CheckpointSaver
from .checkpoint.store import CheckpointStore
from .checkpoint.training_state import make_holder_ranks, training_state_names, training_state_pieces
from .config import RunConfig
from .data.inspect import unigram_entropy
from .data.manifest import DataManifest
from .data.prepared import PreparedData, open_prepared_data
from .data.samples import SampleDataset, SampleOrder
from .data.tokenizer import Tokenizer
from .model.attention_backend import (
    CPU_ATTENTION,
    GpuCapabilities,
    SelectedAttention,
    attention_by_name,
    probe_attention,
    select_attention,
)
from .model.chunk import Chunk
from .model.init import initialize_weights
from .model.model import Model
from .model.recompute import RecomputeModule
from .model.stage_layout import StageLayout
from .optimizer.adamw import AdamW
from .optimizer.config import OptimizerConfig
from .optimizer.ema import WeightEMA
from .run.bucket_plan import plan_buckets
from .run.schedule_cache import ScheduleCache
from .run.step import Stepper
from .run.warm_up import warm_up_step
from .telemetry.trace import TraceRecorder


@dataclass(frozen=True)
class RankResources:
    """Model, data and stores of one rank."""

    config: RunConfig
    groups: ProcessGroups
    device: torch.device
    dtype: torch.dtype
    engine: TrainingEngine
    train_samples: SampleDataset
    sample_order: SampleOrder
    validation_samples: SampleDataset
    unigram_entropy: float
    tokenizer: Tokenizer
    data_manifest: DataManifest
    checkpoint_store: CheckpointStore
    checkpoint_saver: CheckpointSaver
    checkpoint_tensor_names: frozenset[str]
    """Every tensor of a checkpoint, whichever rank holds it."""
    trace_recorder: TraceRecorder
    """Off but for steps that are looked at closely."""

    @property
    def pipeline(self) -> PipelineRuntime:
        """This rank's end of it."""
        return self.engine.pipeline

    @property
    def stepper(self) -> Stepper:
        """What takes steps."""
        return self.engine.stepper

    @property
    def exchange_traffic(self) -> TrafficCounter:
        """Of the token exchange."""
        return self.engine.exchange_traffic

    @property
    def model(self) -> Model:
        """This rank's share."""
        return self.stepper.model

    def local_checkpoint_pieces(self) -> list[TensorPiece]:
        """What a checkpoint holds of this rank, as views: fill them, `optimizer.publish`, then train on."""
        optimizer, average = self.stepper.optimizer, self.stepper.ema
        optimizer.wait_for_weights()
        holders = make_holder_ranks(self.pipeline.stages, self.groups)
        return list(training_state_pieces(self.model, optimizer, average, holders, self.groups.rank))

    def close(self) -> None:
        """End what runs the exchanges and reductions, and what writes checkpoints."""
        self.checkpoint_saver.close()
        self.engine.close()


@dataclass(frozen=True)
class PipelineRuntime:
    """One rank's end of the pipeline: what runs programs on it."""

    stages: StageLayout
    groups: ProcessGroups
    channels: dict[Direction, P2PChannel]
    overlap: bool = True
    """See `ScheduleConfig`."""
    recorder: SpanRecorder = NULL_RECORDER
    recompute: frozenset[RecomputeModule] = frozenset()
    """See `RecomputeConfig`."""
    streams: DeviceStreams | None = None
    """What communication is queued on; None: those of the device."""

    @staticmethod
    def open(
        stages: StageLayout,
        groups: ProcessGroups,
        device: torch.device,
        *,
        overlap: bool = True,
        recorder: SpanRecorder = NULL_RECORDER,
        recompute: frozenset[RecomputeModule] = frozenset(),
        streams: DeviceStreams | None = None,
    ) -> PipelineRuntime:
        """With lanes to the neighbors."""
        lanes = build_p2p_channels(groups, device, recorder, streams)
        return PipelineRuntime(stages, groups, lanes, overlap, recorder, recompute, streams)

    def build_executor(self, program: PipelineProgram) -> PipelineExecutor:
        """Runs this rank's share of `program`."""
        groups = self.groups
        return PipelineExecutor.from_program(
            program,
            groups.pp_rank,
            self.channels,
            groups.pp_next.ranks,
            overlap=self.overlap,
            recorder=self.recorder,
        )

    def build_forward_executor(self, micro_batches: int) -> PipelineExecutor:
        """Runs so many forwards."""
        return self.build_executor(build_forward_program(self.stages.placement, micro_batches))

    def close(self) -> None:
        """End the lanes."""
        for lane in self.channels.values():
            lane.close()


def build_stage_layout(config: RunConfig) -> StageLayout:
    """How the configuration splits its model."""
    schedule = config.schedule
    return StageLayout.build(
        config.model,
        config.training.sequence_length,
        schedule.name,
        config.topology.pp,
        schedule.chunks,
        schedule.layers_per_stage,
    )


def build_rank_resources(config: RunConfig, groups: ProcessGroups, device: torch.device) -> RankResources:
    """Initial weights, optimizer, exchange and data of the rank that `groups` belong to."""
    prepared = open_prepared_data(config.data)
    train, validation = open_samples(config, prepared)
    recorder = TraceRecorder(nvtx=device.type == "cuda")
    engine = build_engine(config, groups, device, recorder)
    dtype = config.precision.compute_dtype(device)
    if device.type == "cuda":
        probe_attention(engine.stepper.model.attention, config.attention_shape(dtype), device)
    store = CheckpointStore(Path(config.training.run_dir) / "checkpoints", config.training.keep_checkpoints)
    return RankResources(
        config=config,
        groups=groups,
        device=device,
        dtype=dtype,
        engine=engine,
        train_samples=train,
        sample_order=SampleOrder(config.training.seed, len(train)),
        validation_samples=validation,
        unigram_entropy=unigram_entropy(prepared.validation, config.model.vocab_size),
        tokenizer=prepared.tokenizer,
        data_manifest=prepared.manifest,
        checkpoint_store=store,
        checkpoint_saver=CheckpointSaver(store, groups.world_cpu),
        checkpoint_tensor_names=training_state_names(config.model, with_ema=config.optimizer.ema_decay is not None),
        trace_recorder=recorder,
    )


@dataclass(frozen=True)
class TrainingEngine:
    """What takes steps on one rank, with all that runs beside it."""

    pipeline: PipelineRuntime
    stepper: Stepper
    exchange_communicator: AsyncCommunicator
    exchange_traffic: TrafficCounter

    def close(self) -> None:
        """End what runs the exchanges and reductions."""
        self.exchange_communicator.close()
        self.stepper.optimizer.wait_for_weights()
        self.stepper.optimizer.close()
        if self.stepper.ema is not None:
            self.stepper.ema.close()
        self.pipeline.close()


def build_engine(
    config: RunConfig,
    groups: ProcessGroups,
    device: torch.device,
    recorder: SpanRecorder,
    streams: DeviceStreams | None = None,
) -> TrainingEngine:
    """Initial weights, optimizer and exchange of the rank that `groups` belong to; no data.

    Communication is queued on `streams`, by default those of `device`.
    """
    order = CollectiveOrderCheck(groups.ep) if config.exchange.check_order else None
    worker = build_async_communicator(groups.ep, device, order, recorder, streams=streams)
    traffic = TrafficCounter(config.topology, groups.rank)
    exchange = build_token_exchange(
        config.exchange, groups, config.model.n_routed_experts, worker, traffic, dispatch_buffer_shape(config)
    )
    pipeline = PipelineRuntime.open(
        build_stage_layout(config),
        groups,
        device,
        overlap=config.schedule.overlap,
        recorder=recorder,
        recompute=config.recompute.recompute_modules,
        streams=streams,
    )
    model, dtype = build_model(config, groups, device), config.precision.compute_dtype(device)
    stepper = build_stepper(pipeline, model, exchange, dtype, config.num_micro_batches, config.optimizer)
    streams = streams or get_device_streams(device)
    if streams is not None:  # gloo connects a group when it is made
        batch = config.schedule.micro_batch_size, config.tokens_per_sample
        warm_up_step(stepper, worker, config.exchange.name, batch, device, streams)
    if groups.watchdog is not None:  # from here on no call has to wait for a rank that still starts
        groups.watchdog.timeout = timedelta(seconds=config.training.collective_timeout_seconds)
    return TrainingEngine(pipeline, stepper, worker, traffic)


def build_stepper(
    pipeline: PipelineRuntime,
    model: Model,
    exchange: TokenExchange[Any],
    dtype: torch.dtype,
    micro_batches: int,
    optimizer: OptimizerConfig,
) -> Stepper:
    """What takes steps with `model`, this rank's share; `micro_batches` are those of most of them."""
    stages, groups = pipeline.stages, pipeline.groups
    program = stages.build_checked_program(micro_batches)
    sharded = build_optimizer(model, stages, program, groups, optimizer, dtype, pipeline.recorder, pipeline.streams)
    average = None
    if optimizer.ema_decay is not None:
        device = sharded.reducer.buckets[0].master_n.device
        average = WeightEMA(sharded, optimizer.ema_decay, pipeline.streams or get_device_streams(device))
    users = [stages.stages_using(bucket.parameter_ranges[0].name) for bucket in sharded.reducer.buckets]
    return Stepper(
        model=model,
        chunks=tuple(
            Chunk(model, exchange, dtype, stage, pipeline.recorder, pipeline.recompute)
            for stage in stages.stages_of_rank(groups.pp_rank)
        ),
        schedule_cache=ScheduleCache(
            lambda count: pipeline.build_executor(stages.build_checked_program(count)),
            pipeline.build_executor(program),
            sharded,
            users,
        ),
        optimizer=sharded,
        ema=average,
        groups=groups,
        recorder=pipeline.recorder,
    )


def build_optimizer(
    model: Model,
    stages: StageLayout,
    program: PipelineProgram,
    groups: ProcessGroups,
    config: OptimizerConfig,
    dtype: torch.dtype,
    recorder: SpanRecorder = NULL_RECORDER,
    streams: DeviceStreams | None = None,
) -> ShardedOptimizer:
    """The optimizer of `model`, this rank's share, whose parameters become views of its buffers.

    Buckets are reduced in the order in which `program` is done with them, and handed out in that in which it needs
    them.
    """
    buckets, final_after, needed_from = [], [], []
    order: list[tuple[int, int]] = []
    for plan in plan_buckets(model, stages, program, dtype):
        group = (groups.expert_dp if plan.is_expert else groups.dense_dp)[plan.holding_pp_ranks]
        buckets.append(
            Bucket(plan.name, plan.members, group, config.moments_dtype(plan.master_dtype), plan.weight_dtype)
        )
        final_after.append(last_use(program, groups.pp_rank, plan.using_stages))
        needed_from.append(first_use(program, groups.pp_rank, plan.using_stages))
        order.append((first_use_on_any_rank(program, plan.using_stages), len(order)))
    device = buckets[0].weights_N.device
    worker = build_async_communicator(
        groups.world, device, recorder=recorder, track=TimelineTrack.REDUCE, streams=streams
    )
    reducer = GradientReducer(buckets, final_after, worker, TrafficCounter(groups.topology, groups.rank))
    return ShardedOptimizer(reducer, AdamW(config), needed_from, [number for _, number in sorted(order)], recorder)


def open_samples(config: RunConfig, prepared: PreparedData) -> tuple[SampleDataset, SampleDataset]:
    """Training and validation samples. Raises `ConfigError` for a split that is shorter than one sample."""
    length, depth = config.training.sequence_length, config.model.num_nextn_predict_layers
    train = SampleDataset.for_training(prepared.train, length, depth)
    return train, SampleDataset.for_validation(prepared.validation, length, depth, prepared.tokenizer.pad_token_id)


def dispatch_buffer_shape(config: RunConfig) -> DeepEPBufferShape:
    """What a rank sends to the experts at once: the tokens of a micro-batch, in training and in evaluation."""
    tokens = config.schedule.micro_batch_size * config.training.sequence_length
    return DeepEPBufferShape(tokens, config.model.hidden_size, config.model.num_experts_per_tok)


def build_model(config: RunConfig, groups: ProcessGroups, device: torch.device) -> Model:
    """This rank's share of the model with its initial weights; routing biases stay FP32 whatever the parameters are."""
    share = build_stage_layout(config).model_shard(config.topology, groups.rank)
    with torch.device(device):
        model = Model(config.model, share)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(config.precision.parameter_dtype())
    initialize_weights(model, config.training.seed)
    fp8 = config.precision.build_fp8_ops(device)
    if fp8 is not None:
        model.enable_fp8(fp8)
    model.set_expert_block_rows(config.expert_block_rows)
    model.set_attention(choose_run_attention(config, device))
    return model


def choose_run_attention(config: RunConfig, device: torch.device) -> SelectedAttention:
    """What computes attention on `device`, which is asked only where the configuration says `auto`."""
    if device.type == "cpu":
        return CPU_ATTENTION
    name = config.training.attention_backend
    if name != "auto":
        return attention_by_name(name)
    return select_attention(
        name, config.attention_shape(config.precision.compute_dtype(device)), GpuCapabilities.detect()
    )
