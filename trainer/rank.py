"""What one rank of a training run holds, made from the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..comm.deepep import BufferShape
from ..comm.groups import ProcessGroups
from ..comm.open_exchange import open_exchange
from ..comm.order import OrderCheck
from ..comm.pending import Worker, open_worker
from ..comm.traffic import Traffic
from ..parallelism.gradients import Gradients
from .checkpoint.store import CheckpointStore
from .config import RunConfig
from .data.entropy import unigram_entropy
from .data.prepared import Prepared, open_prepared
from .data.samples import SampleOrder, Samples
from .data.tokenizer import Tokenizer
from .model.chunk import Chunk
from .model.init import initialise
from .model.model import Model
from .optimizer.adamw import build_adamw
from .step import Stepper


@dataclass(frozen=True)
class Rank:
    """Model, data and stores of one rank."""

    config: RunConfig
    groups: ProcessGroups
    device: torch.device
    dtype: torch.dtype
    chunk: Chunk
    stepper: Stepper
    train: Samples
    order: SampleOrder
    validation: Samples
    unigram_entropy: float
    tokenizer: Tokenizer
    data_digest: str
    store: CheckpointStore
    worker: Worker
    traffic: Traffic

    def close(self) -> None:
        """End what runs the exchanges."""
        self.worker.close()


def build_rank(config: RunConfig, groups: ProcessGroups, device: torch.device) -> Rank:
    """Initial weights, optimizer, exchange and data of the rank that `groups` belong to."""
    prepared = open_prepared(config.data)
    train, validation = open_samples(config, prepared)
    model = build_model(config, groups, device)
    worker = open_worker(groups.ep, device, OrderCheck(groups.ep) if config.exchange.check_order else None)
    traffic = Traffic(config.topology, groups.rank)
    exchange = open_exchange(config.exchange, groups, config.model.experts, worker, traffic, largest_dispatch(config))
    dtype = config.precision.compute_dtype(device)
    chunk = Chunk(model, exchange, dtype)
    parameters = dict(model.named_parameters())
    expert_names = model.expert_parameter_names()
    optimizer = build_adamw(parameters, config.optimizer)
    gradients = Gradients(
        dense=tuple(p for name, p in parameters.items() if name not in expert_names),
        expert=tuple(p for name, p in parameters.items() if name in expert_names),
        groups=groups,
    )
    return Rank(
        config=config,
        groups=groups,
        device=device,
        dtype=dtype,
        chunk=chunk,
        stepper=Stepper(chunk, optimizer, gradients, groups),
        train=train,
        order=SampleOrder(config.training.seed, len(train)),
        validation=validation,
        unigram_entropy=unigram_entropy(prepared.validation, config.model.vocabulary),
        tokenizer=prepared.tokenizer,
        data_digest=prepared.manifest.digest,
        store=CheckpointStore(Path(config.training.run_dir) / "checkpoints", config.training.keep_checkpoints),
        worker=worker,
        traffic=traffic,
    )


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
    ep_rank = config.topology.ep_rank(groups.rank)
    with torch.device(device):
        model = Model(config.model, expert_ranks=config.topology.ep, expert_rank=ep_rank)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(config.precision.parameter_dtype())
    initialise(model, config.training.seed)
    return model
