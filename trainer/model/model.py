"""The modules: embedding, layers, head, and those that predict further tokens (report §2.2).

Letters: D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...parallelism.weight_grad import embedding
from ..precision.fp8 import Fp8LinearOps
from .attention import MultiHeadLatentAttention
from .attention_backend import CPU_ATTENTION, SelectedAttention
from .config import ModelConfig
from .experts import GroupedExperts
from .layer import DenseLayer, MoELayer
from .linear import Linear
from .norm import RMSNorm
from .recompute import RecomputeModule, run_recomputable
from .router import Router


class Embedding(nn.Module):
    """Token to vector."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, hidden))

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [...] to [..., D]."""
        return embedding(tokens, self.weight)


class MTPModule(nn.Module):
    """Predicts one token further from the previous depth's hidden state and the embedding of the token in between.

    Embedding and head are the main model's. Formula and order as in the released weights:
    eh_proj(cat[enorm(embedding), hnorm(hidden)]) (report eq. 21, where the two stand the other way round).
    """

    def __init__(self, config: ModelConfig, local_experts: int) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.project = Linear(2 * config.hidden_size, config.hidden_size)
        self.layer = MoELayer(config, local_experts)
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def merge_inputs(self, hidden_BSD: Tensor, embedded_BSD: Tensor) -> Tensor:
        """The input of this depth's layer, [B, S, D]."""
        merged: Tensor = self.project(run_recomputable(RecomputeModule.NORM, self._normed, embedded_BSD, hidden_BSD))
        return merged

    def _normed(self, embedded_BSD: Tensor, hidden_BSD: Tensor) -> Tensor:
        return torch.cat((self.embedding_norm(embedded_BSD), self.hidden_norm(hidden_BSD)), dim=-1)


@dataclass(frozen=True)
class ModelShard:
    """Which part of the model a rank holds."""

    layers: tuple[int, ...]
    """Their numbers in the whole model, ascending."""
    has_embedding: bool = True
    """At the model's beginning; with MTP at its end, too."""
    has_head: bool = True
    """With the final norm and the MTP modules."""
    ep_size: int = 1
    """Over how many ranks the experts of a layer are spread."""
    ep_rank: int = 0
    """Which share of them this is."""

    @staticmethod
    def full_model(config: ModelConfig, ep_size: int = 1, ep_rank: int = 0) -> ModelShard:
        """Every layer, with one share of the experts."""
        return ModelShard(tuple(range(config.num_hidden_layers)), ep_size=ep_size, ep_rank=ep_rank)


class Model(nn.Module):
    """The modules of DeepSeek-V3 that one rank holds, under their names in the whole model. `chunk.py` runs them."""

    def __init__(self, config: ModelConfig, shard: ModelShard | None = None) -> None:
        super().__init__()
        shard = shard or ModelShard.full_model(config)
        self.config = config
        self.num_local_experts = config.n_routed_experts // shard.ep_size
        self.first_local_expert = shard.ep_rank * self.num_local_experts
        self.embedding = Embedding(config.vocab_size, config.hidden_size) if shard.has_embedding else None
        self.layers = nn.ModuleDict({str(index): self._layer(index) for index in shard.layers})
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if shard.has_head else None
        self.head = Linear(config.hidden_size, config.vocab_size) if shard.has_head else None
        depth = config.num_nextn_predict_layers if shard.has_head else 0
        self.mtp = nn.ModuleList(MTPModule(config, self.num_local_experts) for _ in range(depth))
        self.fp8: Fp8LinearOps | None = None
        self.attention = CPU_ATTENTION

    def _layer(self, index: int) -> DenseLayer | MoELayer:
        dense = index < self.config.first_k_dense_replace
        return DenseLayer(self.config) if dense else MoELayer(self.config, self.num_local_experts)

    def enable_fp8(self, fp8: Fp8LinearOps) -> None:
        """Compute every Linear in FP8 but the head. Embedding, router, norms and attention have none (§3.3.1)."""
        self.fp8 = fp8
        for module in self._fp8_modules():
            module.fp8 = fp8

    def set_attention(self, choice: SelectedAttention) -> None:
        """Compute the attention of every layer as `choice` says."""
        self.attention = choice
        for module in self.modules():
            if isinstance(module, MultiHeadLatentAttention):
                module.core_attention = choice.core_attention

    def fp8_weights(self) -> Iterator[nn.Parameter]:
        """What `use_fp8` makes compute in FP8."""
        for module in self._fp8_modules():
            yield from module.parameters()

    def _fp8_modules(self) -> Iterator[Linear | GroupedExperts]:
        for module in self.modules():
            if isinstance(module, Linear | GroupedExperts) and module is not self.head:
                yield module

    def set_expert_block_rows(self, rows: int) -> None:
        """Let the experts of a layer compute so many rows at once, and no more."""
        for module in self.modules():
            if isinstance(module, GroupedExperts):
                module.block_rows = rows

    def cache_fp8_weights(self) -> AbstractContextManager[None]:
        """Inside, no weight changes: in FP8 each is quantized once."""
        return nullcontext() if self.fp8 is None else self.fp8.weight_cache.enable_for_step()

    def expert_parameter_names(self) -> frozenset[str]:
        """Names of the parameters whose first dimension is this rank's share of the experts."""
        return frozenset(
            f"{module_name}.{name}"
            for module_name, module in self.named_modules()
            if isinstance(module, GroupedExperts)
            for name, _ in module.named_parameters()
        )

    def fp32_parameter_names(self) -> frozenset[str]:
        """Names of the parameters that compute in FP32 at least whatever the rest computes in: norms and routers."""
        return frozenset(
            f"{module_name}.{name}"
            for module_name, module in self.named_modules()
            if isinstance(module, (RMSNorm, Router))
            for name, _ in module.named_parameters()
        )

    def routers(self) -> Iterator[tuple[str, Router]]:
        """Every router here, with the name of its layer."""
        for index, layer in self.layers.items():
            if isinstance(layer, MoELayer):
                yield layer_name(int(index)), layer.router
        for depth, module in enumerate(self.mtp, start=1):
            assert isinstance(module, MTPModule)
            yield mtp_layer_name(depth), module.layer.router


def layer_name(index: int) -> str:
    """A readable name of a layer of the main model."""
    return f"layer_{index:02d}"


def mtp_layer_name(depth: int) -> str:
    """A readable name of the MTP module of this depth, from 1."""
    return f"mtp_{depth:02d}"


def router_names(config: ModelConfig) -> list[str]:
    """The names of all routers of the whole model, in their order."""
    layers = [layer_name(index) for index in range(config.first_k_dense_replace, config.num_hidden_layers)]
    return layers + [mtp_layer_name(depth) for depth in range(1, config.num_nextn_predict_layers + 1)]
