"""Transformer layers. A layer with routed experts has five phases: attend | dispatch | experts | combine | merge.

Attend, experts and merge compute; dispatch and combine are the token exchange, which `chunk.py` runs between them.

Letters: B batch, S sequence, T tokens (B·S), D hidden, K top-k.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from ..costs.operation_memory import MicroBatchShape, OperationMemory, SavedActivation
from .attention import MultiHeadLatentAttention, attention_memory
from .config import ModelConfig
from .experts import GroupedExperts, SwiGLUFeedForward
from .linear import linear_input
from .norm import RMSNorm, norm_statistics
from .recompute import RecomputeModule
from .rope import RotaryEmbedding
from .router import Router, RouterOutput, router_memory


@dataclass(frozen=True)
class LayerContext:
    """Inputs that all layers of one micro-batch share."""

    rotary_embedding: RotaryEmbedding
    valid_BS: Tensor
    """True for tokens, False for padding."""


class DenseLayer(nn.Module):
    """Layer of attention and one feed-forward network: one phase, without communication."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = MultiHeadLatentAttention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = SwiGLUFeedForward(config.hidden_size, config.intermediate_size)

    def forward(self, hidden_BSD: Tensor, context: LayerContext) -> Tensor:
        """Compute [B, S, D] from [B, S, D]."""
        hidden_BSD = hidden_BSD + self.attention(self.attention_norm(hidden_BSD), context.rotary_embedding)
        out_BSD: Tensor = hidden_BSD + self.ffn(self.ffn_norm(hidden_BSD))
        return out_BSD


class MoELayer(nn.Module):
    """Layer of attention and routed experts. It only computes: `chunk.py` runs the token exchange."""

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
        """Run phase 1: return the residual stream after attention, its normed tokens [T, D], and their routing."""
        residual_BSD = hidden_BSD + self.attention(self.attention_norm(hidden_BSD), context.rotary_embedding)
        normed_BSD = self.ffn_norm(residual_BSD)
        return residual_BSD, normed_BSD.flatten(0, 1), self.router(normed_BSD, context.valid_BS)

    @staticmethod
    def add_expert_outputs(residual_BSD: Tensor, routed_TD: Tensor, shared_TD: Tensor | None) -> Tensor:
        """Run phase 5: return the layer's output [B, S, D]."""
        # A plain sum, so that its backward needs no phase: the output's gradient is that of each term.
        mixed_TD = routed_TD if shared_TD is None else routed_TD + shared_TD
        return residual_BSD + mixed_TD.view_as(residual_BSD)


FFN_INPUT = "input of the feed-forward network"


def attend_memory(config: ModelConfig, batch: MicroBatchShape, *, is_dense: bool) -> OperationMemory:
    """Return the memory of a layer up to the input of its network or experts, with the router's in an MoE layer."""
    residual = SavedActivation("residual", batch.hidden_state_bytes(config)), norm_statistics(2, batch)
    attention = OperationMemory(residual) + attention_memory(config, batch)
    if is_dense:
        return attention + OperationMemory((linear_input(FFN_INPUT, batch.tokens, config.hidden_size, batch),))
    # The router saves the norm's output in FP32. The same tensor in the compute dtype is saved for the shared experts
    # only: routed experts save their received rows, and FP8 Linears their FP8 inputs.
    if not batch.is_narrow or (config.n_shared_experts and not batch.fp8):
        size = batch.hidden_state_bytes(config)
        kept = SavedActivation(FFN_INPUT, size, RecomputeModule.NORM, needed_for_wgrad=True)
        attention += OperationMemory((kept,))
    return attention + router_memory(config, batch)
