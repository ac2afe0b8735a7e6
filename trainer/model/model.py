"""Modules of DeepSeek-V3: embedding, layers, head, and multi-token prediction (report §2.2).

Letters: D hidden, V vocabulary.
"""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...parallelism.weight_grad import embedding
from ..costs.operation_memory import MicroBatchShape, OperationMemory, SavedActivation
from ..precision.fp8 import Fp8LinearOps
from .attention import MultiHeadLatentAttention
from .attention_backend import CPU_ATTENTION, AttentionBackend
from .config import ModelConfig
from .experts import GroupedExperts
from .layer import DenseLayer, MoELayer
from .linear import Linear, linear_input
from .norm import RMSNorm, norm_statistics
from .recompute import RecomputeModule, run_recomputable
from .router import Router


class Embedding(nn.Module):
    """Embedding table."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, hidden))

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed int64 tokens [...] as [..., D]."""
        return embedding(tokens, self.weight)


class MTPModule(nn.Module):
    """MTP module of one depth; it predicts one token further from hidden state and embedding of the previous depth.

    Embedding and head are the main model's. Its input is eh_proj(cat[enorm(embedding), hnorm(hidden)]), in the order of
    the released weights; report eq. 21 concatenates the two in the opposite order.
    """

    def __init__(self, config: ModelConfig, local_experts: int) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.project = Linear(2 * config.hidden_size, config.hidden_size)
        self.layer = MoELayer(config, local_experts)
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def merge_inputs(self, hidden_BSD: Tensor, embedded_BSD: Tensor) -> Tensor:
        """Return the input of this depth's layer, [B, S, D]."""
        merged: Tensor = self.project(run_recomputable(RecomputeModule.NORM, self._normed, embedded_BSD, hidden_BSD))
        return merged

    def _normed(self, embedded_BSD: Tensor, hidden_BSD: Tensor) -> Tensor:
        return torch.cat((self.embedding_norm(embedded_BSD), self.hidden_norm(hidden_BSD)), dim=-1)


def embedding_memory(config: ModelConfig, batch: MicroBatchShape) -> OperationMemory:
    """Return the memory of the embedding; its weight gradient holds one row per token, twice if it widens them."""
    hidden = batch.hidden_state_bytes(config)
    rows = (2 if batch.is_narrow else 1) * batch.tokens * config.hidden_size * batch.fp32_element_bytes
    return OperationMemory(output_gradients=hidden, wgrad=rows)


def mtp_merge_memory(config: ModelConfig, batch: MicroBatchShape) -> OperationMemory:
    """Return the memory of an MTP module's embedding and `merge_inputs`."""
    # The gradient of `project`'s output is counted as wide in FP8 too.
    hidden = batch.hidden_state_bytes(config)
    activations = (
        SavedActivation("hidden state and embedding", 2 * hidden),
        norm_statistics(2, batch),
        linear_input("their norms", batch.tokens, 2 * config.hidden_size, batch),
    )
    return OperationMemory(activations, output_gradients=hidden) + embedding_memory(config, batch)


@dataclass(frozen=True)
class ModelShard:
    """Part of the model that a rank holds."""

    layers: tuple[int, ...]
    """Layer numbers in the whole model, ascending."""
    has_embedding: bool = True
    """True on the first stage, and on the last stage if there are MTP modules, which embed tokens too."""
    has_head: bool = True
    """True on the last stage, which also holds the final norm and the MTP modules."""
    ep_size: int = 1
    """Number of ranks that share the experts of a layer."""
    ep_rank: int = 0
    """Index of this rank among them."""

    @staticmethod
    def full_model(config: ModelConfig, ep_size: int = 1, ep_rank: int = 0) -> "ModelShard":
        """Return a shard of every layer, with the experts of one expert-parallel rank."""
        return ModelShard(tuple(range(config.num_hidden_layers)), ep_size=ep_size, ep_rank=ep_rank)


class Model(nn.Module):
    """Modules of DeepSeek-V3 that one rank holds, named as in the whole model. `chunk.py` runs them."""

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
        """Compute all Linears except the head in FP8; embedding, router, norms and attention stay wide (§3.3.1)."""
        self.fp8 = fp8
        for module in self._fp8_modules():
            module.fp8 = fp8

    def set_attention(self, choice: AttentionBackend) -> None:
        """Set the attention backend of every layer."""
        self.attention = choice
        for module in self.modules():
            if isinstance(module, MultiHeadLatentAttention):
                module.core_attention = choice.core_attention

    def fp8_weights(self) -> Iterator[nn.Parameter]:
        """Yield the weights that `enable_fp8` computes with in FP8."""
        for module in self._fp8_modules():
            yield from module.parameters()

    def _fp8_modules(self) -> Iterator[Linear | GroupedExperts]:
        for module in self.modules():
            if isinstance(module, Linear | GroupedExperts) and module is not self.head:
                yield module

    def set_expert_block_rows(self, rows: int) -> None:
        """Set the largest number of rows that the experts of a layer compute in one call."""
        for module in self.modules():
            if isinstance(module, GroupedExperts):
                module.block_rows = rows

    def cache_fp8_weights(self) -> AbstractContextManager[None]:
        """Return a context in which weights do not change, so that FP8 quantizes each of them once."""
        return nullcontext() if self.fp8 is None else self.fp8.weight_cache.enable_for_step()

    def expert_parameter_names(self) -> frozenset[str]:
        """Return the names of the parameters whose first dimension is the experts of this rank."""
        return self._parameter_names(GroupedExperts)

    def fp32_parameter_names(self) -> frozenset[str]:
        """Return the names of the parameters that are FP32 or wider for any compute dtype: norms and routers."""
        return self._parameter_names(RMSNorm, Router)  # report §3.3.1 keeps norms and gating in higher precision

    def _parameter_names(self, *kinds: type[nn.Module]) -> frozenset[str]:
        """Return the names of the parameters of the modules of these kinds."""
        modules = [(path, module) for path, module in self.named_modules() if isinstance(module, kinds)]
        return frozenset(f"{path}.{name}" for path, module in modules for name, _ in module.named_parameters())

    def routers(self) -> Iterator[tuple[str, Router]]:
        """Yield every router of this shard with the name of its layer."""
        for index, layer in self.layers.items():
            if isinstance(layer, MoELayer):
                yield layer_name(int(index)), layer.router
        for depth, module in enumerate(self.mtp, start=1):
            assert isinstance(module, MTPModule)
            yield mtp_layer_name(depth), module.layer.router


def layer_name(index: int) -> str:
    """Return the display name of a layer of the main model."""
    return f"layer_{index:02d}"


def mtp_layer_name(depth: int) -> str:
    """Return the display name of the MTP module of this depth, counted from 1."""
    return f"mtp_{depth:02d}"


def router_names(config: ModelConfig) -> list[str]:
    """Return the names of all routers of the whole model, in layer order."""
    layers = [layer_name(index) for index in range(config.first_k_dense_replace, config.num_hidden_layers)]
    return layers + [mtp_layer_name(depth) for depth in range(1, config.num_nextn_predict_layers + 1)]


@torch.no_grad()
def initialize_weights(model: Model, seed: int) -> None:
    """Set all weights to N(0, `initializer_range`²) (report §4.2), norms to 1 and routing biases to 0, in place."""
    # One generator per expert, seeded by its number in the whole layer: every expert-parallel size gives equal weights.
    expert_names = model.expert_parameter_names()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        elif name in expert_names:
            for index, expert in enumerate(parameter):
                _fill(expert, f"{name}.{model.first_local_expert + index}", seed, model.config.initializer_range)
        else:
            _fill(parameter, name, seed, model.config.initializer_range)
    for _, router in model.routers():
        router.bias_E.zero_()


def _fill(weight: Tensor, name: str, seed: int, std: float) -> None:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    weight.copy_(torch.randn(weight.shape, generator=generator).mul_(std))
