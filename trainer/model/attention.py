"""Multi-head latent attention (report §2.1.1, eq. 1-11).

Letters: B batch, S sequence, D hidden, H heads, C latent rank. Head widths: `nope` without rotation, `rope` with it.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from ..costs.operation_memory import MicroBatchShape, OperationMemory, SavedActivation
from ..precision.attention_output import SharedAttentionOutput
from ..precision.e5m6 import e5m6_bytes
from ..precision.fp8_tensors import rowwise_fp8_bytes
from .attention_backend import AttentionFunction
from .config import ModelConfig
from .cpu_attention import causal_attention, saved_probability_count
from .linear import Linear, gemm_bytes, output_gradient_bytes, wgrad_bytes
from .norm import RMSNorm, norm_statistics
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


def attention_memory(config: ModelConfig, batch: MicroBatchShape) -> OperationMemory:
    """Return the memory of `MultiHeadLatentAttention`, with its input, the output of a norm."""
    tokens, heads, hidden = batch.tokens, config.num_attention_heads, config.hidden_size
    query_ranks = [] if config.q_lora_rank is None else [config.q_lora_rank]
    latents, key_value = sum(query_ranks) + config.kv_lora_rank, config.qk_nope_head_dim + config.v_head_dim
    attended = heads * config.v_head_dim
    outputs = [heads * config.qk_head_dim, config.kv_lora_rank + config.qk_rope_head_dim, heads * key_value, hidden]
    # The peak of the forward is at `out`, in FP8 with the wide inputs of all Linears, of which only FP8 is saved; that
    # of the backward at core attention: gradients of queries, keys, values and output, of the residual stream, and of
    # the norm before the feed-forward network.
    wide_inputs = tokens * (hidden + latents + attended) * batch.element_bytes if batch.fp8 else 0
    gradients = tokens * (2 * heads * (config.qk_head_dim + config.v_head_dim) + 2 * hidden) * batch.element_bytes
    product = gemm_bytes(tokens, hidden, attended, batch)
    return OperationMemory(
        activations=tuple(_saved_activations(config, batch, latents)),
        output_gradients=output_gradient_bytes(tokens, [*outputs, *query_ranks], batch),
        wgrad=wgrad_bytes(
            tokens,
            max(config.q_lora_rank or hidden, config.kv_lora_rank),
            heads * max(config.qk_head_dim, key_value),
            batch,
        ),
        forward_workspace=wide_inputs + batch.hidden_state_bytes(config) + product,
        backward_workspace=gradients + product,
    )


def _saved_activations(config: ModelConfig, batch: MicroBatchShape, latents: int) -> Iterator[SavedActivation]:
    tokens, heads, hidden = batch.tokens, config.num_attention_heads, config.hidden_size
    attended = heads * config.v_head_dim

    def numbers(name: str, per_token: int, part: RecomputeModule | None, *, for_wgrad: bool = False) -> SavedActivation:
        return SavedActivation(name, tokens * per_token * batch.element_bytes, part, needed_for_wgrad=for_wgrad)

    if batch.fp8:
        # Linears with the same input save one FP8 copy each: `q_down` (or `q_proj`) and `kv_down`, then the up
        # projections. The wide norms are saved only as inputs of recomputed up projections.
        widths = [hidden, hidden, config.kv_lora_rank, *([] if config.q_lora_rank is None else [config.q_lora_rank])]
        tiles = sum(rowwise_fp8_bytes(tokens, width) for width in widths)
        yield SavedActivation("FP8 inputs", tiles, RecomputeModule.NORM, needed_for_wgrad=True)
        whole = tokens * (latents + (hidden if config.q_lora_rank is None else 0)) * batch.element_bytes
        yield SavedActivation("norms", whole, RecomputeModule.NORM, recompute_source_of=RecomputeModule.UP_PROJECTION)
        yield SavedActivation("output in E5M6", e5m6_bytes(tokens, attended), needed_for_wgrad=True)
    else:
        yield numbers("input and norms", hidden + latents, RecomputeModule.NORM, for_wgrad=True)
        yield numbers("output", attended, RecomputeModule.ATTENTION, for_wgrad=True)
    yield numbers("compressed queries, keys and values", latents + config.qk_rope_head_dim, None)
    # Queries, keys, and the up-projection of keys and values: values are views of it, so they hold the memory of the
    # unrotated keys too.
    widths_per_head = 2 * config.qk_head_dim + config.qk_nope_head_dim + config.v_head_dim
    yield numbers("queries, keys and values", heads * widths_per_head, RecomputeModule.UP_PROJECTION)
    if batch.on_cpu:
        elements = batch.sequences * heads * saved_probability_count(batch.sequence_length)
        yield SavedActivation("probabilities", elements * batch.element_bytes, RecomputeModule.ATTENTION)
    else:  # a fused kernel recomputes the probabilities from one number per query and head
        size = tokens * heads * batch.fp32_element_bytes
        yield SavedActivation("log of the sum of each softmax", size, RecomputeModule.ATTENTION)
    yield norm_statistics(1 if config.q_lora_rank is None else 2, batch)
