"""Objects of one rank of a training run, built from the configuration."""

from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..comm.async_comm import AsyncCommunicator, CollectiveOrderCheck, build_async_communicator
from ..comm.errors import ConfigError, Problem
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
from ..parallelism.zero.optimizer import ShardedOptimizer
from ..parallelism.zero.reduce import GradientReducer
from .checkpoint.pieces import TensorPiece
from .checkpoint.saver import CheckpointSaver
from .checkpoint.store import CheckpointStore
from .checkpoint.training_state import training_state_names, training_state_pieces
from .config import RunConfig
from .data.inspect import unigram_entropy
from .data.manifest import DataManifest
from .data.prepared import PreparedData, open_prepared_data
from .data.samples import SampleDataset, SampleOrder
from .data.tokenizer import Tokenizer
from .model.attention_backend import choose_attention, probe_attention
from .model.chunk import Chunk
from .model.model import Model, initialize_weights
from .model.recompute import RecomputeModule
from .model.stage_layout import StageLayout
from .optimizer.adamw import AdamW
from .optimizer.config import OptimizerConfig
from .optimizer.ema import WeightEMA
from .run.bucket_plan import build_buckets
from .run.step import Stepper
from .run.warm_up import warm_up_step
from .telemetry.trace import TraceRecorder


@dataclass(frozen=True)
class RankResources:
    """Engine, data and checkpoint store of one rank."""

    config: RunConfig
    groups: ProcessGroups
    device: torch.device
    dtype: torch.dtype
    engine: "TrainingEngine"
    train_samples: SampleDataset
    sample_order: SampleOrder
    validation_samples: SampleDataset
    unigram_entropy: float
    tokenizer: Tokenizer
    data_manifest: DataManifest
    checkpoint_store: CheckpointStore
    checkpoint_saver: CheckpointSaver
    checkpoint_tensor_names: frozenset[str]
    """Names of all tensors of a checkpoint, over all ranks."""
    trace_recorder: TraceRecorder
    """Recorder of timeline spans; it records only in steps that are profiled or traced."""

    def local_checkpoint_pieces(self) -> list[TensorPiece]:
        """Return this rank's part of a checkpoint, as views.

        To restore it, write into the views and call `optimizer.all_gather_weights`.
        """
        stepper = self.engine.stepper
        stepper.optimizer.wait_for_weights()
        stages, groups = self.engine.pipeline.stages, self.groups

        def holders(name: str) -> tuple[int, ...]:
            return tuple(sorted(groups.dense_dp[stages.pp_ranks_holding(name)].ranks))

        return list(training_state_pieces(stepper.model, stepper.optimizer, stepper.ema, holders, self.groups.rank))

    def close(self) -> None:
        """Close the checkpoint saver and the engine."""
        self.checkpoint_saver.close()
        self.engine.close()


@dataclass(frozen=True)
class PipelineRuntime:
    """Pipeline of one rank: stages, process groups and P2P channels; builds the executors of programs."""

    stages: StageLayout
    groups: ProcessGroups
    device: torch.device
    overlap: bool = True
    """See `ScheduleConfig`."""
    recorder: SpanRecorder = NULL_RECORDER
    recompute: frozenset[RecomputeModule] = frozenset()
    """See `RecomputeConfig`."""
    streams: DeviceStreams | None = None
    """Streams that communication is queued on; None: those of the device."""

    @cached_property
    def channels(self) -> dict[Direction, P2PChannel]:
        """P2P channels to the neighboring pipeline ranks, opened at the first use."""
        groups = self.groups
        return build_p2p_channels(groups.pp_next, groups.pp_prev, self.device, self.recorder, self.streams)

    def build_executor(self, program: PipelineProgram) -> PipelineExecutor:
        """Build the executor of this rank's instructions of `program`."""
        groups = self.groups
        return PipelineExecutor(
            program,
            groups.pp_rank,
            self.channels,
            groups.pp_next.ranks,
            self.overlap,
            self.recorder,
        )

    def build_forward_executor(self, micro_batches: int) -> PipelineExecutor:
        """Build the executor of forwards alone, over `micro_batches` micro-batches."""
        return self.build_executor(build_forward_program(self.stages.placement, micro_batches))

    def close(self) -> None:
        """Close the P2P channels."""
        for channel in self.channels.values():
            channel.close()


def build_stage_layout(config: RunConfig) -> StageLayout:
    """Split the configured model into pipeline stages."""
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
    """Build engine, data and checkpoint store of the rank that `groups` belong to."""
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
    """Stepper of one rank, with the pipeline and the token exchange that it uses."""

    pipeline: PipelineRuntime
    stepper: Stepper
    exchange_communicator: AsyncCommunicator
    exchange_traffic: TrafficCounter

    def close(self) -> None:
        """Stop the threads of exchanges, reductions and weight average."""
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
    """Build model, optimizer, pipeline and token exchange of the rank that `groups` belong to, without data.

    Communication is queued on `streams`, by default those of `device`. Collective over all ranks.
    """
    order = CollectiveOrderCheck(groups.ep) if config.exchange.check_order else None
    worker = build_async_communicator(groups.ep, device, order, recorder, streams=streams)
    traffic = TrafficCounter(config.topology, groups.rank)
    exchange = build_token_exchange(
        config.exchange, groups, config.model.n_routed_experts, worker, traffic, dispatch_buffer_shape(config)
    )
    pipeline = PipelineRuntime(
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
    # NCCL connects at the first use of a group, and may block there until its peer makes the same call, so one step
    # without effect connects everything now, under the longer `start_timeout_seconds`. gloo connects a new group.
    if streams is not None:
        batch = config.schedule.micro_batch_size, config.tokens_per_sample
        warm_up_step(stepper, worker, config.exchange.name, batch, device, streams)
    if groups.watchdog is not None:  # all ranks have started: from here on the shorter timeout holds
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
    """Build the stepper of `model`, this rank's shard; most steps have `micro_batches` micro-batches."""
    stages, groups = pipeline.stages, pipeline.groups
    program = stages.build_checked_program(micro_batches)
    sharded = build_optimizer(model, stages, program, groups, optimizer, dtype, pipeline.recorder, pipeline.streams)
    average = None
    if optimizer.ema_decay is not None:
        device = sharded.reducer.buckets[0].master_n.device
        average = WeightEMA(sharded, optimizer.ema_decay, pipeline.streams or get_device_streams(device))
    return Stepper(
        model=model,
        chunks=tuple(
            Chunk(model, exchange, dtype, stage, pipeline.recorder, pipeline.recompute)
            for stage in stages.stages_of_rank(groups.pp_rank)
        ),
        executor=pipeline.build_executor(program),
        build_executor=lambda count: pipeline.build_executor(stages.build_checked_program(count)),
        optimizer=sharded,
        bucket_stages=tuple(stages.stages_using(each.parameter_ranges[0].name) for each in sharded.reducer.buckets),
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
    """Build the ZeRO-1 optimizer of `model`, this rank's shard, whose parameters become views of its buckets."""
    # Buckets are reduced in the order in which `program` last uses them, and all-gathered in the order in which the
    # next step first uses them, so that both overlap with compute.
    built = list(build_buckets(model, stages, program, groups, config, dtype))
    buckets, users = [bucket for bucket, _ in built], [stages_using for _, stages_using in built]
    final_after = [last_use(program, groups.pp_rank, each) for each in users]
    needed_from = [first_use(program, groups.pp_rank, each) for each in users]
    order = sorted(range(len(users)), key=lambda number: first_use_on_any_rank(program, users[number]))
    device = buckets[0].weights_N.device
    worker = build_async_communicator(
        groups.world, device, recorder=recorder, track=TimelineTrack.REDUCE, streams=streams
    )
    reducer = GradientReducer(buckets, final_after, worker, TrafficCounter(groups.topology, groups.rank))
    return ShardedOptimizer(reducer, AdamW(config), needed_from, order, recorder)


def open_samples(config: RunConfig, prepared: PreparedData) -> tuple[SampleDataset, SampleDataset]:
    """Open training and validation samples.

    Raises `ConfigError` for a split that is shorter than one sample, and for tokens that the model has no rows for.
    """
    tokens, rows = prepared.manifest.settings.vocab_size, config.model.vocab_size
    if tokens > rows:  # fewer are legal: the rows that are left are never a target
        hint = f"is less than the {tokens} token ids of {config.data.prepared}; write {tokens} or more, or null"
        raise ConfigError([Problem("model.vocab_size", rows, hint)])
    length, depth = config.training.sequence_length, config.model.num_nextn_predict_layers
    train = SampleDataset(prepared.train, length, depth)
    return train, SampleDataset(prepared.validation, length, depth, prepared.tokenizer.pad_token_id)


def dispatch_buffer_shape(config: RunConfig) -> DeepEPBufferShape:
    """Return the largest dispatch of one rank: the tokens of a micro-batch, in training and in evaluation."""
    tokens = config.schedule.micro_batch_size * config.training.sequence_length
    return DeepEPBufferShape(tokens, config.model.hidden_size, config.model.num_experts_per_tok)


def build_model(config: RunConfig, groups: ProcessGroups, device: torch.device) -> Model:
    """Build this rank's shard of the model with initial weights; routing biases are FP32 for any parameter dtype."""
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
    shape = config.attention_shape(config.precision.compute_dtype(device))
    model.set_attention(choose_attention(config.training.attention_backend, shape, device))
    return model
