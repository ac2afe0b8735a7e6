"""Transformer layers. A layer with routed experts is five phases: attend | dispatch | experts | combine | merge.

Attend, experts and merge compute; dispatch and combine are the token exchange, which `chunk.py` drives between them.

Letters: B batch, S sequence, T tokens (B·S), D hidden, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .attention import MultiHeadLatentAttention
from .config import ModelConfig
from .experts import GroupedExperts, SwiGLUFeedForward
from .norm import RMSNorm
from .rope import RotaryEmbedding
from .router import Router, RouterOutput


@dataclass(frozen=True)
class LayerContext:
    """What every layer of one micro-batch shares."""

    rotary_embedding: RotaryEmbedding
    valid_BS: Tensor
    """Real tokens; the others are padding."""


class DenseLayer(nn.Module):
    """Attention and one feed-forward network: no communication, one phase."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = MultiHeadLatentAttention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = SwiGLUFeedForward(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_BSD: Tensor, context: LayerContext) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        hidden_BSD = hidden_BSD + self.attention(self.attention_norm(hidden_BSD), context.rotary_embedding)
        out_BSD: Tensor = hidden_BSD + self.ffn(self.ffn_norm(hidden_BSD))
        return out_BSD


class MoELayer(nn.Module):
    """Attention and routed experts. The exchange is not here: the layer only computes."""

    def __init__(self, config: ModelConfig, local_experts: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = MultiHeadLatentAttention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.router = Router(config)
        shared = config.n_shared_experts
        self.shared = SwiGLUFeedForward(config.hidden_size, shared * config.moe_intermediate_size) if shared else None
        self.experts = GroupedExperts(local_experts, config.hidden_size, config.moe_intermediate_size)

    def attend_and_route(self, hidden_BSD: Tensor, context: LayerContext) -> tuple[Tensor, Tensor, RouterOutput]:
        """Phase 1: the residual stream after attention, its normed tokens_TD for the experts, and where they go."""
        residual_BSD = hidden_BSD + self.attention(self.attention_norm(hidden_BSD), context.rotary_embedding)
        normed_BSD = self.ffn_norm(residual_BSD)
        return residual_BSD, normed_BSD.flatten(0, 1), self.router(normed_BSD, context.valid_BS)

    @staticmethod
    def add_expert_outputs(residual_BSD: Tensor, routed_TD: Tensor, shared_TD: Tensor | None) -> Tensor:
        """Phase 5: the layer's output. A plain sum: its gradient goes unchanged to each part."""
        mixed_TD = routed_TD if shared_TD is None else routed_TD + shared_TD
        return residual_BSD + mixed_TD.view_as(residual_BSD)
