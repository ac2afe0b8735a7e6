"""A whole model on one process, from a checkpoint of any layout."""

from __future__ import annotations

from datetime import timedelta

import torch

from ...comm.async_comm import open_worker
from ...comm.exchange.config import ExchangeConfig
from ...comm.exchange.factory import open_exchange
from ...comm.groups import ProcessGroups
from ...comm.topology import Topology
from ...comm.traffic import Traffic
from ..checkpoint.names import model_pieces
from ..checkpoint.opened import Checkpoint
from ..checkpoint.pieces import MODEL
from ..model.attention_backend import ON_CPU, AttentionChoice
from ..model.chunk import Chunk
from ..model.model import Model


def load_chunk(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, attention: AttentionChoice = ON_CPU
) -> Chunk:
    """All layers in one chunk that computes in `dtype`; parameters keep the checkpoint's. Raises `Damaged`."""
    config, topology = checkpoint.model, Topology()
    with torch.device(device):
        model = Model(config)
    stored = checkpoint.manifest.tensors[f"{MODEL}/embedding.weight"].dtype
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored)
    model.use_attention(attention)
    for piece in model_pieces(model):
        checkpoint.fill(piece)
    groups = ProcessGroups.create(topology, 0, timedelta(seconds=1))
    worker = open_worker(groups.ep, device)
    exchange = open_exchange(ExchangeConfig(), groups, config.n_routed_experts, worker, Traffic(topology, 0))
    return Chunk(model, exchange, dtype)
