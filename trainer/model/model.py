"""The whole model: embedding, layers, head, and the modules that predict further tokens (report §2.2).

Letters: D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..precision.linear import Linear
from .config import ModelConfig
from .experts import Experts
from .layer import DenseLayer, MoELayer
from .norm import RMSNorm
from .router import Router


class Embedding(nn.Module):
    """Token to vector."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, hidden))

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [...] to [..., D]."""
        return F.embedding(tokens, self.weight)


class MTPModule(nn.Module):
    """Predicts one token further from the previous depth's hidden state and the embedding of the token in between.

    Embedding and head are the main model's. Formula and order as in the released weights:
    eh_proj(cat[enorm(embedding), hnorm(hidden)]) (report eq. 21, where the two stand the other way round).
    """

    def __init__(self, config: ModelConfig, local_experts: int) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(config.hidden, config.norm_eps)
        self.hidden_norm = RMSNorm(config.hidden, config.norm_eps)
        self.project = Linear(2 * config.hidden, config.hidden)
        self.layer = MoELayer(config, local_experts)
        self.final_norm = RMSNorm(config.hidden, config.norm_eps)

    def merge_inputs(self, hidden_BSD: Tensor, embedded_BSD: Tensor) -> Tensor:
        """The input of this depth's layer, [B, S, D]."""
        both = (self.embedding_norm(embedded_BSD), self.hidden_norm(hidden_BSD))
        merged: Tensor = self.project(torch.cat(both, dim=-1))
        return merged


class Model(nn.Module):
    """The modules of DeepSeek-V3. `chunk.py` runs them.

    `expert_ranks` is over how many ranks the experts are spread; this one holds share number `expert_rank`.
    """

    def __init__(self, config: ModelConfig, expert_ranks: int = 1, expert_rank: int = 0) -> None:
        super().__init__()
        self.config = config
        self.local_experts = config.experts // expert_ranks
        self.first_expert = expert_rank * self.local_experts
        self.embedding = Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(
            DenseLayer(config) if index < config.dense_layers else MoELayer(config, self.local_experts)
            for index in range(config.layers)
        )
        self.final_norm = RMSNorm(config.hidden, config.norm_eps)
        self.head = Linear(config.hidden, config.vocabulary)
        self.mtp = nn.ModuleList(MTPModule(config, self.local_experts) for _ in range(config.mtp_depth))

    def expert_parameter_names(self) -> frozenset[str]:
        """Names of the parameters whose first dimension is this rank's share of the experts."""
        return frozenset(
            f"{module_name}.{name}"
            for module_name, module in self.named_modules()
            if isinstance(module, Experts)
            for name, _ in module.named_parameters()
        )

    def routers(self) -> Iterator[tuple[str, Router]]:
        """Every router with a readable name of its layer: `layer_03` of the main model, `mtp_01`."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, MoELayer):
                yield f"layer_{index:02d}", layer.router
        for depth, module in enumerate(self.mtp, start=1):
            assert isinstance(module, MTPModule)
            yield f"mtp_{depth:02d}", module.layer.router
