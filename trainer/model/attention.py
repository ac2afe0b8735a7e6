"""Multi-head latent attention (report §2.1.1, eq. 1-11).

Letters: B batch, S sequence, D hidden, H heads, C latent rank. Head widths: `nope` without rotation, `rope` with it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..precision.attention_output import SharedAttentionOutput
from .attention_backend import AttentionFunction
from .config import ModelConfig
from .cpu_attention import causal_attention
from .linear import Linear
from .norm import RMSNorm
from .recompute import RecomputeModule, run_checkpointed, run_recomputable
from .rope import RotaryEmbedding, softmax_scale

# The released model code uses this value for any epsilon of the layers.
LATENT_NORM_EPS = 1e-6
"""Epsilon of the norms on compressed queries, keys and values."""


class MultiHeadLatentAttention(nn.Module):
    """Causal attention whose keys and values are projections of one small latent vector per token.

    Documents packed into one sequence attend to each other, as in report §4.1 (no cross-sample masking).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
        if rank is None:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim)
        else:
            self.q_down = Linear(hidden, rank)
            self.q_norm = RMSNorm(rank, LATENT_NORM_EPS)
            self.q_up = Linear(rank, heads * config.qk_head_dim)
        self.kv_down = Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_norm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_up = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.out = Linear(heads * config.v_head_dim, hidden, after_attention=True)
        self.core_attention: AttentionFunction = causal_attention
        """Function of core attention, set by `Model.set_attention`."""

    def forward(self, x_BSD: Tensor, rotation: RotaryEmbedding) -> Tensor:
        """Compute [B, S, D] from [B, S, D]."""
        config = self.config
        query_BSC = x_BSD if config.q_lora_rank is None else self.q_norm(self.q_down(x_BSD))  # eq. 6
        latent_BSC, k_rope_BS = self.kv_down(x_BSD).split((config.kv_lora_rank, config.qk_rope_head_dim), -1)  # eq. 1
        latent_BSC = self.kv_norm(latent_BSC)
        heads = run_recomputable(RecomputeModule.UP_PROJECTION, self._heads, query_BSC, latent_BSC, k_rope_BS, rotation)
        q_BHS, k_BHS, v_BHS = (x.transpose(1, 2) for x in heads)
        # In FP8 attention and `out` save the same numbers; sharing one E5M6 copy drops the wide one (report §3.3.3).
        shared = SharedAttentionOutput() if self.out.fp8 is not None else None
        attend = self.core_attention if shared is None else partial(shared.run_attention, self.core_attention)
        o_BHS = run_checkpointed(
            RecomputeModule.ATTENTION, attend, q_BHS, k_BHS, v_BHS, softmax_scale(config)
        )  # eq. 10
        out: Tensor = self.out(o_BHS.transpose(1, 2).flatten(2), shared)  # eq. 11
        return out

    def _heads(
        self, query_BSC: Tensor, latent_BSC: Tensor, k_rope_BS: Tensor, rotation: RotaryEmbedding
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of all heads, [B, S, H, any]."""
        config = self.config
        nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        up = self.q_proj if config.q_lora_rank is None else self.q_up
        q_nope, q_rope = (
            up(query_BSC).unflatten(-1, (config.num_attention_heads, -1)).split((nope, rope), dim=-1)
        )  # eq. 7-8

        kv_BSH = self.kv_up(latent_BSC).unflatten(-1, (config.num_attention_heads, -1))
        k_nope, v = kv_BSH.split((nope, config.v_head_dim), dim=-1)  # eq. 2, 5
        k_rope = rotation.apply(k_rope_BS[:, :, None]).expand(
            -1, -1, config.num_attention_heads, -1
        )  # eq. 3: one for all heads

        q = torch.cat((q_nope, rotation.apply(q_rope)), dim=-1)  # eq. 9
        return q, torch.cat((k_nope, k_rope), dim=-1), v  # eq. 4
