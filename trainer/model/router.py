"""DeepSeekMoE's router: affinity, selection under bias and group limit, gates, balance loss (report §2.1.2).

Letters: B batch, S sequence, T tokens (B·S), D hidden, E experts, K top-k, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...parallelism.weight_grad import linear
from ..precision.fp8_tensors import promote_to_fp32
from .config import ModelConfig
from .recompute import RecomputeModule, run_recomputable


@dataclass(frozen=True)
class RouterOutput:
    """Where each token goes."""

    gates_TK: Tensor
    """FP32 at least; carries the gradient to the router."""
    expert_ids_TK: Tensor
    """int64."""
    balance_loss: Tensor
    """eq. 17 without α, summed over the sequences of this micro-batch; carries a gradient."""
    tokens_per_expert_E: Tensor
    """int64: how many valid tokens chose each expert. Padding is never counted."""


class Router(nn.Module):
    """Token to K experts. Logits, affinities and gates are FP32 at least, whatever the rest computes in."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("bias_E", torch.zeros(config.n_routed_experts, dtype=torch.float32))
        self.bias_E: Tensor

    def forward(self, x_BSD: Tensor, valid_BS: Tensor) -> RouterOutput:
        """Route each token; tokens that are not valid are routed too, but neither counted nor balanced."""
        x_TD = run_recomputable(
            RecomputeModule.NORM, promote_to_fp32, x_BSD.flatten(0, 1)
        )  # of what a norm gives, wider
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
        """The K experts of highest affinity + bias within the M best groups (eq. 16 and "node-limited routing")."""
        config = self.config
        score_TE = affinity_TE + self.bias_E
        if config.topk_group < config.n_group:
            score_TGE = score_TE.unflatten(1, (config.n_group, -1))
            best = min(2, score_TGE.shape[-1])  # a group's score is the sum of its two best experts, K / M = 2 in V3
            group_score_TG = score_TGE.topk(best, dim=-1).values.sum(dim=-1)
            groups_TM = group_score_TG.topk(config.topk_group, dim=-1).indices
            allowed_TG = torch.zeros_like(group_score_TG, dtype=torch.bool).scatter_(1, groups_TM, True)
            score_TE = score_TGE.masked_fill(~allowed_TG[:, :, None], float("-inf")).flatten(1)
        return score_TE.topk(config.num_experts_per_tok, dim=-1).indices

    def _balance_loss(self, affinity_BSE: Tensor, chosen_BSE: Tensor, valid_BS: Tensor) -> Tensor:
        """Σ_sequences Σ_i f_i P_i (eq. 17-20), over each sequence's valid tokens.

        f counts the experts that tokens are sent to. Eq. 18 writes the top-k of the affinity alone, without the bias;
        balancing one selection and dispatching another would pull the router in a direction that no expert sees.
        """
        tokens_B1 = valid_BS.sum(dim=1, keepdim=True).clamp(min=1).to(affinity_BSE.dtype)  # no valid token: loss 0
        fraction_BE = chosen_BSE.sum(dim=1) * (
            self.config.n_routed_experts / (self.config.num_experts_per_tok * tokens_B1)
        )  # eq. 18
        share_BSE = affinity_BSE / affinity_BSE.sum(dim=-1, keepdim=True)  # eq. 19
        probability_BE = (share_BSE * valid_BS[..., None]).sum(dim=1) / tokens_B1  # eq. 20
        return (fraction_BE * probability_BE).sum()


@torch.no_grad()
def update_router_bias(bias_E: Tensor, counts_E: Tensor, update_rate: float) -> None:
    """Auxiliary-loss-free balancing: b_i += γ for experts under the mean load, b_i -= γ over it, in place.

    Report §2.1.2. `counts_E` is the int64 load over the whole global batch. The comparison is exact:
    sign(total - E · count) in integers.
    """
    total = counts_E.sum()
    bias_E += update_rate * torch.sign(total - counts_E.numel() * counts_E).to(bias_E.dtype)
