"""What one rank of a training run holds, made from the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..comm.deepep import BufferShape
from ..comm.exchange import TokenExchange
from ..comm.groups import ProcessGroups
from ..comm.lane import Lane
from ..comm.open_exchange import open_exchange
from ..comm.order import OrderCheck
from ..comm.pending import Worker, open_worker
from ..comm.record import SILENT, Recorder
from ..comm.traffic import Traffic
from ..parallelism.gradients import Gradients, Replicated
from ..parallelism.pipeline.executor import Executor, open_lanes
from ..parallelism.pipeline.placement import Direction
from ..parallelism.pipeline.program import Program
from ..parallelism.pipeline.schedules import build_forward
from .checkpoint.names import holders_of, state_pieces, whole_state
from .checkpoint.pieces import MODEL, Piece
from .checkpoint.saver import Saver
from .checkpoint.store import CheckpointStore
from .config import RunConfig
from .data.entropy import unigram_entropy
from .data.manifest import Manifest
from .data.prepared import Prepared, open_prepared
from .data.samples import SampleOrder, Samples
from .data.tokenizer import Tokenizer
from .model.chunk import Chunk
from .model.init import initialise
from .model.model import Model
from .optimizer.adamw import MOMENTS, build_adamw, state_parts
from .optimizer.config import OptimizerConfig
from .stages import Stages
from .step import Stepper
from .telemetry.trace import TraceRecorder, open_recorder, recorder_of


@dataclass(frozen=True)
class Rank:
    """Model, data and stores of one rank."""

    config: RunConfig
    groups: ProcessGroups
    device: torch.device
    dtype: torch.dtype
    pipeline: Pipeline
    stepper: Stepper
    train: Samples
    order: SampleOrder
    validation: Samples
    unigram_entropy: float
    tokenizer: Tokenizer
    data: Manifest
    store: CheckpointStore
    saver: Saver
    state_names: frozenset[str]
    """Every tensor of a checkpoint, whichever rank holds it."""
    worker: Worker
    traffic: Traffic
    trace: TraceRecorder | None
    """None unless the run is traced."""

    @property
    def model(self) -> Model:
        """This rank's share."""
        return self.stepper.model

    def state(self) -> list[Piece]:
        """What a checkpoint holds of this rank, as views: filling them changes the model."""
        parts = state_parts(dict(self.model.named_parameters()), self.stepper.optimizer)
        holders = holders_of(self.model, self.pipeline.stages, self.groups)
        return list(state_pieces(self.model, parts, holders, self.groups.rank))

    def close(self) -> None:
        """End what runs the exchanges and writes checkpoints."""
        self.saver.close()
        self.worker.close()
        self.pipeline.close()


@dataclass(frozen=True)
class Pipeline:
    """One rank's end of the pipeline: what runs programs on it."""

    stages: Stages
    groups: ProcessGroups
    lanes: dict[Direction, Lane]
    overlap: bool = True
    """See `ScheduleConfig`."""
    recorder: Recorder = SILENT

    @staticmethod
    def open(
        stages: Stages,
        groups: ProcessGroups,
        device: torch.device,
        *,
        overlap: bool = True,
        recorder: Recorder = SILENT,
    ) -> Pipeline:
        """With lanes to the neighbours."""
        return Pipeline(stages, groups, open_lanes(groups, device, recorder), overlap, recorder)

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
    trace = open_recorder(trace=config.telemetry.trace, device=device)
    recorder = recorder_of(trace)
    order = OrderCheck(groups.ep) if config.exchange.check_order else None
    worker = open_worker(groups.ep, device, order, recorder)
    traffic = Traffic(config.topology, groups.rank)
    exchange = open_exchange(config.exchange, groups, config.model.experts, worker, traffic, largest_dispatch(config))
    pipeline = Pipeline.open(stages_of(config), groups, device, overlap=config.schedule.overlap, recorder=recorder)
    model, dtype = build_model(config, groups, device), config.precision.compute_dtype(device)
    store = CheckpointStore(Path(config.training.run_dir) / "checkpoints", config.training.keep_checkpoints)
    return Rank(
        config=config,
        groups=groups,
        device=device,
        dtype=dtype,
        pipeline=pipeline,
        stepper=build_stepper(pipeline, model, exchange, dtype, config.micro_batches, config.optimizer),
        train=train,
        order=SampleOrder(config.training.seed, len(train)),
        validation=validation,
        unigram_entropy=unigram_entropy(prepared.validation, config.model.vocabulary),
        tokenizer=prepared.tokenizer,
        data=prepared.manifest,
        store=store,
        saver=Saver(store, groups.world),
        state_names=whole_state(config.model, (MODEL, *MOMENTS)),
        worker=worker,
        traffic=traffic,
        trace=trace,
    )


def build_stepper(
    pipeline: Pipeline,
    model: Model,
    exchange: TokenExchange[Any],
    dtype: torch.dtype,
    micro_batches: int,
    optimizer: OptimizerConfig,
) -> Stepper:
    """What takes steps of so many micro-batches with `model`, this rank's share."""
    stages, groups = pipeline.stages, pipeline.groups
    return Stepper(
        model=model,
        chunks=tuple(
            Chunk(model, exchange, dtype, stage, pipeline.recorder) for stage in stages.chunks(groups.pp_rank)
        ),
        executor=pipeline.executor(stages.program(micro_batches)),
        optimizer=build_adamw(dict(model.named_parameters()), optimizer),
        gradients=gradients_of(model, stages, groups),
        groups=groups,
        recorder=pipeline.recorder,
    )


def gradients_of(model: Model, stages: Stages, groups: ProcessGroups) -> Gradients:
    """The parameters of `model` by the ranks that hold them too, in one order on all ranks."""
    expert_names, topology, rank = model.expert_parameter_names(), groups.topology, groups.rank
    shares: dict[tuple[bool, tuple[int, ...]], list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        shares.setdefault((name in expert_names, stages.holders(name)), []).append(parameter)
    replicated = []
    for (is_expert, holders), parameters in sorted(shares.items(), key=lambda item: item[0]):
        group = (groups.expert if is_expert else groups.dense)[holders]
        first_replica = topology.edp_rank(rank) == 0 if is_expert else topology.dp_rank(rank) == 0
        counts = first_replica and groups.pp_rank == holders[0]
        replicated.append(Replicated(tuple(parameters), group, counts))
    return Gradients(tuple(replicated), groups.world)


def open_samples(config: RunConfig, prepared: Prepared) -> tuple[Samples, Samples]:
    """Training and validation samples. Raises `Refused` for a split that is shorter than one sample."""
    length, depth = config.training.sequence_length, config.model.mtp_depth
    train = Samples.training(prepared.train, length, depth)
    return train, Samples.validation(prepared.validation, length, depth, prepared.tokenizer.pad)


def largest_dispatch(config: RunConfig) -> BufferShape:
    """What a rank sends to the experts at once: the tokens of a micro-batch, in training and in evaluation."""
    tokens = config.schedule.micro_batch * config.training.sequence_length
    return BufferShape(tokens, config.model.hidden, config.model.top_k)


def build_model(config: RunConfig, groups: ProcessGroups, device: torch.device) -> Model:
    """This rank's share of the model with its initial weights; routing biases stay FP32 whatever the parameters are."""
    share = stages_of(config).share(config.topology, groups.rank)
    with torch.device(device):
        model = Model(config.model, share)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(config.precision.parameter_dtype())
    initialise(model, config.training.seed)
    return model
