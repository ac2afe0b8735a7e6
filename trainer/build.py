"""What one rank of a training run holds, made from the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ..comm.async_comm import AsyncCommunicator, OrderCheck, open_worker
from ..comm.exchange.api import TokenExchange
from ..comm.exchange.deepep_buffer import BufferShape
from ..comm.exchange.factory import open_exchange
from ..comm.groups import ProcessGroups
from ..comm.p2p import P2PChannel
from ..comm.streams import Streams, streams_of
from ..comm.trace import SILENT, SpanRecorder, Track
from ..comm.traffic import Traffic
from ..parallelism.pipeline.executor import Executor, open_lanes
from ..parallelism.pipeline.liveness import first_use, first_use_anywhere, last_use
from ..parallelism.pipeline.placement import Direction
from ..parallelism.pipeline.program import Program
from ..parallelism.pipeline.schedules.registry import build_forward
from ..parallelism.zero.bucket import Bucket
from ..parallelism.zero.optimizer import ShardedOptimizer
from ..parallelism.zero.reduce import Reducer
from .checkpoint.names import holders_of, state_pieces, whole_state
from .checkpoint.pieces import Piece
from .checkpoint.saver import Saver
from .checkpoint.store import CheckpointStore
from .config import RunConfig
from .data.inspect import unigram_entropy
from .data.manifest import DataManifest
from .data.prepared import Prepared, open_prepared
from .data.samples import SampleOrder, Samples
from .data.tokenizer import Tokenizer
from .model.attention_backend import ON_CPU, AttentionChoice, GpuFacts, choose_attention, named_attention, try_attention
from .model.chunk import Chunk
from .model.init import initialize
from .model.model import Model
from .model.recompute import RecomputeModule
from .model.stage_layout import Stages
from .optimizer.adamw import AdamW
from .optimizer.average import WeightAverage
from .optimizer.config import OptimizerConfig
from .run.bucket_plan import plan_buckets
from .run.schedule_cache import ScheduleCache
from .run.step import Stepper
from .run.warm_up import warm_up
from .telemetry.trace import TraceRecorder


@dataclass(frozen=True)
class Rank:
    """Model, data and stores of one rank."""

    config: RunConfig
    groups: ProcessGroups
    device: torch.device
    dtype: torch.dtype
    engine: Engine
    train: Samples
    order: SampleOrder
    validation: Samples
    unigram_entropy: float
    tokenizer: Tokenizer
    data: DataManifest
    store: CheckpointStore
    saver: Saver
    state_names: frozenset[str]
    """Every tensor of a checkpoint, whichever rank holds it."""
    trace: TraceRecorder
    """Off but for steps that are looked at closely."""

    @property
    def pipeline(self) -> Pipeline:
        """This rank's end of it."""
        return self.engine.pipeline

    @property
    def stepper(self) -> Stepper:
        """What takes steps."""
        return self.engine.stepper

    @property
    def traffic(self) -> Traffic:
        """Of the token exchange."""
        return self.engine.traffic

    @property
    def model(self) -> Model:
        """This rank's share."""
        return self.stepper.model

    def state(self) -> list[Piece]:
        """What a checkpoint holds of this rank, as views: fill them, `optimizer.publish`, then train on."""
        optimizer, average = self.stepper.optimizer, self.stepper.average
        optimizer.wait()
        holders = holders_of(self.pipeline.stages, self.groups)
        return list(state_pieces(self.model, optimizer, average, holders, self.groups.rank))

    def close(self) -> None:
        """End what runs the exchanges and reductions, and what writes checkpoints."""
        self.saver.close()
        self.engine.close()


@dataclass(frozen=True)
class Pipeline:
    """One rank's end of the pipeline: what runs programs on it."""

    stages: Stages
    groups: ProcessGroups
    lanes: dict[Direction, P2PChannel]
    overlap: bool = True
    """See `ScheduleConfig`."""
    recorder: SpanRecorder = SILENT
    recompute: frozenset[RecomputeModule] = frozenset()
    """See `RecomputeConfig`."""
    streams: Streams | None = None
    """What communication is queued on; None: those of the device."""

    @staticmethod
    def open(
        stages: Stages,
        groups: ProcessGroups,
        device: torch.device,
        *,
        overlap: bool = True,
        recorder: SpanRecorder = SILENT,
        recompute: frozenset[RecomputeModule] = frozenset(),
        streams: Streams | None = None,
    ) -> Pipeline:
        """With lanes to the neighbors."""
        lanes = open_lanes(groups, device, recorder, streams)
        return Pipeline(stages, groups, lanes, overlap, recorder, recompute, streams)

    def executor(self, program: Program) -> Executor:
        """Runs this rank's share of `program`."""
        groups = self.groups
        return Executor.of(
            program,
            groups.pp_rank,
            self.lanes,
            groups.up.ranks,
            overlap=self.overlap,
            recorder=self.recorder,
        )

    def forwards(self, micro_batches: int) -> Executor:
        """Runs so many forwards."""
        return self.executor(build_forward(self.stages.placement, micro_batches))

    def close(self) -> None:
        """End the lanes."""
        for lane in self.lanes.values():
            lane.close()


def stages_of(config: RunConfig) -> Stages:
    """How the configuration splits its model."""
    schedule = config.schedule
    return Stages.of(
        config.model,
        config.training.sequence_length,
        schedule.name,
        config.topology.pp,
        schedule.chunks,
        schedule.layout,
    )


def build_rank(config: RunConfig, groups: ProcessGroups, device: torch.device) -> Rank:
    """Initial weights, optimizer, exchange and data of the rank that `groups` belong to."""
    prepared = open_prepared(config.data)
    train, validation = open_samples(config, prepared)
    recorder = TraceRecorder(nvtx=device.type == "cuda")
    engine = open_engine(config, groups, device, recorder)
    dtype = config.precision.compute_dtype(device)
    if device.type == "cuda":
        try_attention(engine.stepper.model.attention, config.attention_case(dtype), device)
    store = CheckpointStore(Path(config.training.run_dir) / "checkpoints", config.training.keep_checkpoints)
    return Rank(
        config=config,
        groups=groups,
        device=device,
        dtype=dtype,
        engine=engine,
        train=train,
        order=SampleOrder(config.training.seed, len(train)),
        validation=validation,
        unigram_entropy=unigram_entropy(prepared.validation, config.model.vocab_size),
        tokenizer=prepared.tokenizer,
        data=prepared.manifest,
        store=store,
        saver=Saver(store, groups.control),
        state_names=whole_state(config.model, averages=config.optimizer.ema_decay is not None),
        trace=recorder,
    )


@dataclass(frozen=True)
class Engine:
    """What takes steps on one rank, with all that runs beside it."""

    pipeline: Pipeline
    stepper: Stepper
    worker: AsyncCommunicator
    traffic: Traffic

    def close(self) -> None:
        """End what runs the exchanges and reductions."""
        self.worker.close()
        self.stepper.optimizer.wait()
        self.stepper.optimizer.close()
        if self.stepper.average is not None:
            self.stepper.average.close()
        self.pipeline.close()


def open_engine(
    config: RunConfig,
    groups: ProcessGroups,
    device: torch.device,
    recorder: SpanRecorder,
    streams: Streams | None = None,
) -> Engine:
    """Initial weights, optimizer and exchange of the rank that `groups` belong to; no data.

    Communication is queued on `streams`, by default those of `device`.
    """
    order = OrderCheck(groups.ep) if config.exchange.check_order else None
    worker = open_worker(groups.ep, device, order, recorder, streams=streams)
    traffic = Traffic(config.topology, groups.rank)
    exchange = open_exchange(
        config.exchange, groups, config.model.n_routed_experts, worker, traffic, largest_dispatch(config)
    )
    pipeline = Pipeline.open(
        stages_of(config),
        groups,
        device,
        overlap=config.schedule.overlap,
        recorder=recorder,
        recompute=config.recompute.policy,
        streams=streams,
    )
    model, dtype = build_model(config, groups, device), config.precision.compute_dtype(device)
    stepper = build_stepper(pipeline, model, exchange, dtype, config.micro_batches, config.optimizer)
    streams = streams or streams_of(device)
    if streams is not None:  # gloo connects a group when it is made
        batch = config.schedule.micro_batch, config.window
        warm_up(stepper, worker, config.exchange.name, batch, device, streams)
    if groups.watchdog is not None:  # from here on no call has to wait for a rank that still starts
        groups.watchdog.limit = timedelta(seconds=config.training.collective_timeout_seconds)
    return Engine(pipeline, stepper, worker, traffic)


def build_stepper(
    pipeline: Pipeline,
    model: Model,
    exchange: TokenExchange[Any],
    dtype: torch.dtype,
    micro_batches: int,
    optimizer: OptimizerConfig,
) -> Stepper:
    """What takes steps with `model`, this rank's share; `micro_batches` are those of most of them."""
    stages, groups = pipeline.stages, pipeline.groups
    program = stages.program(micro_batches)
    sharded = build_optimizer(model, stages, program, groups, optimizer, dtype, pipeline.recorder, pipeline.streams)
    average = None
    if optimizer.ema_decay is not None:
        device = sharded.reducer.buckets[0].master_n.device
        average = WeightAverage(sharded, optimizer.ema_decay, pipeline.streams or streams_of(device))
    users = [stages.users(bucket.extents[0].name) for bucket in sharded.reducer.buckets]
    return Stepper(
        model=model,
        chunks=tuple(
            Chunk(model, exchange, dtype, stage, pipeline.recorder, pipeline.recompute)
            for stage in stages.chunks(groups.pp_rank)
        ),
        programs=ScheduleCache(
            lambda count: pipeline.executor(stages.program(count)), pipeline.executor(program), sharded, users
        ),
        optimizer=sharded,
        average=average,
        groups=groups,
        recorder=pipeline.recorder,
    )


def build_optimizer(
    model: Model,
    stages: Stages,
    program: Program,
    groups: ProcessGroups,
    config: OptimizerConfig,
    dtype: torch.dtype,
    recorder: SpanRecorder = SILENT,
    streams: Streams | None = None,
) -> ShardedOptimizer:
    """The optimizer of `model`, this rank's share, whose parameters become views of its buffers.

    Buckets are reduced in the order in which `program` is done with them, and handed out in that in which it needs
    them.
    """
    buckets, final_after, needed_from = [], [], []
    order: list[tuple[int, int]] = []
    for plan in plan_buckets(model, stages, program, dtype):
        group = (groups.expert if plan.is_expert else groups.dense)[plan.holders]
        buckets.append(Bucket(plan.name, plan.members, group, config.moments_dtype(plan.masters), plan.weights))
        final_after.append(last_use(program, groups.pp_rank, plan.users))
        needed_from.append(first_use(program, groups.pp_rank, plan.users))
        order.append((first_use_anywhere(program, plan.users), len(order)))
    device = buckets[0].weights_N.device
    worker = open_worker(groups.world, device, recorder=recorder, track=Track.REDUCE, streams=streams)
    reducer = Reducer(buckets, final_after, worker, Traffic(groups.topology, groups.rank))
    return ShardedOptimizer(reducer, AdamW(config), needed_from, [number for _, number in sorted(order)], recorder)


def open_samples(config: RunConfig, prepared: Prepared) -> tuple[Samples, Samples]:
    """Training and validation samples. Raises `ConfigError` for a split that is shorter than one sample."""
    length, depth = config.training.sequence_length, config.model.num_nextn_predict_layers
    train = Samples.training(prepared.train, length, depth)
    return train, Samples.validation(prepared.validation, length, depth, prepared.tokenizer.pad)


def largest_dispatch(config: RunConfig) -> BufferShape:
    """What a rank sends to the experts at once: the tokens of a micro-batch, in training and in evaluation."""
    tokens = config.schedule.micro_batch * config.training.sequence_length
    return BufferShape(tokens, config.model.hidden_size, config.model.num_experts_per_tok)


def build_model(config: RunConfig, groups: ProcessGroups, device: torch.device) -> Model:
    """This rank's share of the model with its initial weights; routing biases stay FP32 whatever the parameters are."""
    share = stages_of(config).share(config.topology, groups.rank)
    with torch.device(device):
        model = Model(config.model, share)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(config.precision.parameter_dtype())
    initialize(model, config.training.seed)
    fp8 = config.precision.fp8(device)
    if fp8 is not None:
        model.use_fp8(fp8)
    model.compute_in_blocks(config.expert_rows)
    model.use_attention(choose_for_run(config, device))
    return model


def choose_for_run(config: RunConfig, device: torch.device) -> AttentionChoice:
    """What computes attention on `device`, which is asked only where the configuration says `auto`."""
    if device.type == "cpu":
        return ON_CPU
    name = config.training.attention
    if name != "auto":
        return named_attention(name)
    return choose_attention(name, config.attention_case(config.precision.compute_dtype(device)), GpuFacts.here())
