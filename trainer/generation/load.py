"""Loading of a whole model in one process from a checkpoint of any layout."""

from __future__ import annotations

from datetime import timedelta

import torch

from ...comm.async_comm import build_async_communicator
from ...comm.exchange.config import ExchangeConfig
from ...comm.exchange.factory import build_token_exchange
from ...comm.groups import ProcessGroups
from ...comm.topology import Topology
from ...comm.traffic import TrafficCounter
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.pieces import MODEL_STATE
from ..checkpoint.training_state import model_pieces
from ..model.attention_backend import CPU_ATTENTION, SelectedAttention
from ..model.chunk import Chunk
from ..model.model import Model


def load_chunk_for_inference(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, attention: SelectedAttention = CPU_ATTENTION
) -> Chunk:
    """Return all layers in one chunk that computes in `dtype`; parameters keep the checkpoint's dtype.

    Raises `CheckpointDamaged`.
    """
    config, topology = checkpoint.model_config, Topology()
    with torch.device(device):
        model = Model(config)
    stored = checkpoint.manifest.tensors[f"{MODEL_STATE}/embedding.weight"].dtype
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored)
    model.set_attention(attention)
    for piece in model_pieces(model):
        checkpoint.fill_piece(piece)
    groups = ProcessGroups.create(topology, 0, timedelta(seconds=1))
    worker = build_async_communicator(groups.ep, device)
    exchange = build_token_exchange(
        ExchangeConfig(), groups, config.n_routed_experts, worker, TrafficCounter(topology, 0)
    )
    return Chunk(model, exchange, dtype)
