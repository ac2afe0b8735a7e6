"""Router of DeepSeekMoE: affinities, node-limited top-k with bias, gates, and balance loss (report §2.1.2).

Letters: B batch, S sequence, T tokens (B·S), D hidden, E experts, K top-k, G groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...parallelism.weight_grad import linear
from ..costs.operation_memory import MicroBatchShape, OperationMemory, SavedActivation
from ..precision.fp8_tensors import promote_to_fp32
from .config import ModelConfig
from .recompute import RecomputeModule, run_recomputable


@dataclass(frozen=True)
class RouterOutput:
    """Experts and gates of each token."""

    gates_TK: Tensor
    """Gate weights, FP32 or wider; differentiable."""
    expert_ids_TK: Tensor
    """Chosen experts, int64."""
    balance_loss: Tensor
    """Loss of eq. 17 without α, summed over the sequences of this micro-batch; differentiable."""
    tokens_per_expert_E: Tensor
    """Valid tokens that chose each expert, int64; padding is not counted."""


class Router(nn.Module):
    """Top-k router. Logits, affinities and gates are FP32 or wider for any compute dtype."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("bias_E", torch.zeros(config.n_routed_experts, dtype=torch.float32))
        self.bias_E: Tensor

    def forward(self, x_BSD: Tensor, valid_BS: Tensor) -> RouterOutput:
        """Route each token. Padding is routed too, but it counts neither in the load nor in the balance loss."""
        # The FP32 copy is twice as large as the BF16 output of the norm, and is recomputed with it.
        x_TD = run_recomputable(RecomputeModule.NORM, promote_to_fp32, x_BSD.flatten(0, 1))
        logits_TE = linear(x_TD, self.weight)
        affinity_TE = (
            logits_TE.sigmoid() if self.config.scoring_func == "sigmoid" else logits_TE.softmax(dim=-1)
        )  # eq. 15
        experts_TK = self._select(affinity_TE.detach())
        gates_TK = affinity_TE.gather(1, experts_TK)
        if self.config.norm_topk_prob:
            gates_TK = gates_TK / (gates_TK.sum(dim=-1, keepdim=True) + 1e-20)  # eq. 13
        chosen_TE = torch.zeros_like(affinity_TE, dtype=torch.bool).scatter_(1, experts_TK, True)
        chosen_TE &= valid_BS.reshape(-1, 1)
        shape_BSE = (*valid_BS.shape, self.config.n_routed_experts)
        return RouterOutput(
            gates_TK=gates_TK * self.config.routed_scaling_factor,
            expert_ids_TK=experts_TK,
            balance_loss=self._balance_loss(affinity_TE.view(shape_BSE), chosen_TE.view(shape_BSE), valid_BS),
            tokens_per_expert_E=chosen_TE.sum(dim=0),
        )

    def _select(self, affinity_TE: Tensor) -> Tensor:
        """Select the K experts of highest affinity + bias within the M best groups (eq. 16, node-limited routing)."""
        config = self.config
        score_TE = affinity_TE + self.bias_E
        if config.topk_group < config.n_group:
            score_TGE = score_TE.unflatten(1, (config.n_group, -1))
            # Report §2.1.2 scores a group by the sum of its K / M best experts; that is 2 in V3, and fixed in its code.
            best = min(2, score_TGE.shape[-1])
            group_score_TG = score_TGE.topk(best, dim=-1).values.sum(dim=-1)
            groups_TM = group_score_TG.topk(config.topk_group, dim=-1).indices
            allowed_TG = torch.zeros_like(group_score_TG, dtype=torch.bool).scatter_(1, groups_TM, True)
            score_TE = score_TGE.masked_fill(~allowed_TG[:, :, None], float("-inf")).flatten(1)
        return score_TE.topk(config.num_experts_per_tok, dim=-1).indices

    def _balance_loss(self, affinity_BSE: Tensor, chosen_BSE: Tensor, valid_BS: Tensor) -> Tensor:
        """Return Σ_sequences Σ_i f_i P_i (eq. 17-20) over each sequence's valid tokens."""
        # f counts the experts that tokens are dispatched to. Eq. 18 takes the top-k of the affinity without the bias;
        # that would balance one selection and dispatch another.
        tokens_B1 = valid_BS.sum(dim=1, keepdim=True).clamp(min=1).to(affinity_BSE.dtype)  # no valid token: loss 0
        fraction_BE = chosen_BSE.sum(dim=1) * (
            self.config.n_routed_experts / (self.config.num_experts_per_tok * tokens_B1)
        )  # eq. 18
        share_BSE = affinity_BSE / affinity_BSE.sum(dim=-1, keepdim=True)  # eq. 19
        probability_BE = (share_BSE * valid_BS[..., None]).sum(dim=1) / tokens_B1  # eq. 20
        return (fraction_BE * probability_BE).sum()


def router_memory(config: ModelConfig, batch: MicroBatchShape) -> OperationMemory:
    """Return the memory of the router; an FP32 output of the norm before it is not counted here if others save it."""
    wide, tokens = batch.fp32_element_bytes, batch.tokens
    experts, top_k = config.n_routed_experts, config.num_experts_per_tok
    # The affinities' sum for the balance loss, and with normalization the K gates and their sum.
    sums = 1 + (top_k + 1 if config.norm_topk_prob else 0)
    activations = [
        SavedActivation("affinities", tokens * experts * wide),
        SavedActivation("choices", tokens * top_k * torch.int64.itemsize),
        SavedActivation("gates and sums", tokens * sums * wide),
        SavedActivation("load of each sequence", batch.sequences * (experts + 1) * wide),
    ]
    if batch.is_narrow:
        size = tokens * config.hidden_size * wide
        activations.append(SavedActivation("its input in FP32", size, RecomputeModule.NORM, needed_for_wgrad=True))
    return OperationMemory(tuple(activations), output_gradients=tokens * experts * wide)


@torch.no_grad()
def update_router_bias(bias_E: Tensor, counts_E: Tensor, update_rate: float) -> None:
    """Update routing biases in place: b_i += γ for experts below the mean load, b_i -= γ above it (report §2.1.2).

    `counts_E` is the int64 load over the whole global batch, `update_rate` is γ.
    """
    # In integers, total - E · count: a mean load in floating point could miss an equality and move a balanced bias.
    total = counts_E.sum()
    bias_E += update_rate * torch.sign(total - counts_E.numel() * counts_E).to(bias_E.dtype)
