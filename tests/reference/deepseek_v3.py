"""DeepSeek-V3 and its training loss in one process: plain functions over a dict of tensors, and ordinary autograd.

The real model and every parallel layout are compared with this reference, so it shares no code with them,
takes no shortcut and loops over experts. Equations are those of the DeepSeek-V3 technical report (arXiv 2412.19437).

Parameters are named as in the released checkpoint. Module k of multi-token prediction (MTP) is layer `layers + k - 1`
there; embedding and head are shared with the main model and stored once. Any floating dtype works: what needs care
(norms, router, softmax, losses) is computed in `promote_types(dtype, float32)`, so an FP64 run is FP64 throughout.

Shape suffixes: B batch, W window of tokens (S + 1 + mtp_depth), S sequence, D hidden, H heads, Q and U query-key
and value widths of a head, C latent rank, T tokens (B*S, or those that count), E experts (of a group, after G),
K top-k, G groups, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shoestring.tests.reference.rotary import Yarn, rotate, softmax_factor

# The norms of the compressed latents keep this epsilon whatever `rms_norm_eps` says, as in transformers' DeepSeek-V3.
LATENT_NORM_EPS = 1e-6
BIAS = "mlp.gate.e_score_correction_bias"


@dataclass(frozen=True)
class ReferenceConfig:
    """A DeepSeek-V3 model and its loss weights.

    The first `first_k_dense_replace` of `num_hidden_layers` have a dense FFN; all others, and those of MTP modules,
    have experts.
    `q_lora_rank` None: queries are not compressed. The shared expert is
    `n_shared_experts * moe_intermediate_size` wide.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    yarn: Yarn | None = None
    num_nextn_predict_layers: int = 0
    balance_alpha: float = 1e-4
    mtp_weight: float = 0.3


@dataclass(frozen=True)
class Routing:
    """The router's decision in one layer, each [B, S, E]: all scores, the choice, and its gates (0 elsewhere)."""

    scores: Tensor
    gates: Tensor
    chosen: Tensor


@dataclass(frozen=True)
class Losses:
    """Scalars `total = main + mtp + balance`, and per MoE layer the valid input tokens of each expert, int64 [E]."""

    total: Tensor
    main: Tensor
    mtp: Tensor
    balance: Tensor
    counts: dict[int, Tensor]


Params = Mapping[str, Tensor]


def is_trained(name: str) -> bool:
    """Return whether gradients move the parameter `name`: all but the routing biases."""
    return not name.endswith(BIAS)


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x` in FP32, or unchanged where it is more precise already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Apply the root-mean-square norm over the last dimension."""
    wide = at_least_float32(x)
    return weight * (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype)


def swiglu(params: Params, prefix: str, x: Tensor) -> Tensor:
    """Return `down(silu(gate(x)) * up(x))` with the three matrices found under `prefix`."""
    inner = F.silu(F.linear(x, params[f"{prefix}.gate_proj.weight"])) * F.linear(x, params[f"{prefix}.up_proj.weight"])
    return F.linear(inner, params[f"{prefix}.down_proj.weight"])


def attention(params: Params, prefix: str, config: ReferenceConfig, x_BSD: Tensor) -> Tensor:
    """Apply multi-head latent attention with a causal mask (eq. 1-11). Return [B, S, D]."""
    batch, length, _ = x_BSD.shape
    nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim

    def weight(name: str) -> Tensor:
        return params[f"{prefix}.{name}.weight"]

    if config.q_lora_rank is None:
        queries = F.linear(x_BSD, weight("q_proj"))
    else:
        latent = rms_norm(F.linear(x_BSD, weight("q_a_proj")), weight("q_a_layernorm"), LATENT_NORM_EPS)
        queries = F.linear(latent, weight("q_b_proj"))
    q_nope, q_rope = torch.split(
        queries.view(batch, length, config.num_attention_heads, nope + rope), [nope, rope], dim=-1
    )
    q_BSHQ = torch.cat([q_nope, rotate(q_rope, config.rope_theta, config.yarn)], dim=-1)

    compressed = F.linear(x_BSD, weight("kv_a_proj_with_mqa"))
    latent_BSC, k_rope = torch.split(compressed, [config.kv_lora_rank, rope], dim=-1)
    latent_BSC = rms_norm(latent_BSC, weight("kv_a_layernorm"), LATENT_NORM_EPS)
    keys_and_values = F.linear(latent_BSC, weight("kv_b_proj")).view(batch, length, config.num_attention_heads, -1)
    k_nope, v_BSHU = torch.split(keys_and_values, [nope, config.v_head_dim], dim=-1)
    # All heads share one rotary key.
    k_rope = rotate(k_rope[:, :, None, :], config.rope_theta, config.yarn).expand(
        -1, -1, config.num_attention_heads, -1
    )
    k_BSHQ = torch.cat([k_nope, k_rope], dim=-1)

    scale = (nope + rope) ** -0.5 * softmax_factor(config.yarn)
    logits_BHSS = torch.einsum("bshq,bthq->bhst", at_least_float32(q_BSHQ), at_least_float32(k_BSHQ)) * scale
    future_SS = torch.ones(length, length, dtype=torch.bool, device=x_BSD.device).triu(1)
    weights_BHSS = logits_BHSS.masked_fill(future_SS, float("-inf")).softmax(-1).to(x_BSD.dtype)
    mixed_BSHU = torch.einsum("bhst,bthu->bshu", weights_BHSS, v_BSHU)
    return F.linear(mixed_BSHU.flatten(2), weight("o_proj"))


def route(params: Params, prefix: str, config: ReferenceConfig, x_BSD: Tensor) -> Routing:
    """Choose `top_k` experts of the best `top_k_groups` groups for each token (eq. 13-16, §2.1.2).

    The bias takes part in the choice only. A group is as good as the sum of its two best biased scores.
    """
    weight_ED = params[f"{prefix}.gate.weight"]
    scores_BSE = F.linear(at_least_float32(x_BSD), at_least_float32(weight_ED)).sigmoid()
    with torch.no_grad():
        biased_BSE = scores_BSE + params[f"{prefix}.gate.e_score_correction_bias"]
        biased_BSGE = biased_BSE.view(*biased_BSE.shape[:-1], config.n_group, -1)
        group_scores_BSG = biased_BSGE.topk(2, dim=-1).values.sum(-1)
        best_BSG = group_scores_BSG.topk(config.topk_group, dim=-1).indices
        allowed_BSG = torch.zeros_like(group_scores_BSG, dtype=torch.bool).scatter(-1, best_BSG, True)
        biased_BSE = biased_BSGE.masked_fill(~allowed_BSG[..., None], float("-inf")).flatten(-2)
        chosen_BSK = biased_BSE.topk(config.num_experts_per_tok, dim=-1).indices
        chosen_BSE = torch.zeros_like(scores_BSE, dtype=torch.bool).scatter(-1, chosen_BSK, True)
    gates_BSE = scores_BSE * chosen_BSE
    if config.norm_topk_prob:
        gates_BSE = gates_BSE / (gates_BSE.sum(-1, keepdim=True) + 1e-20)
    return Routing(scores_BSE, gates_BSE * config.routed_scaling_factor, chosen_BSE)


def mixture(params: Params, prefix: str, config: ReferenceConfig, x_BSD: Tensor) -> tuple[Tensor, Routing]:
    """Return the shared expert plus the gated sum of the chosen experts (eq. 12). No token is dropped."""
    routing = route(params, prefix, config, x_BSD)
    x_TD, gates_TE, chosen_TE = x_BSD.flatten(0, 1), routing.gates.flatten(0, 1), routing.chosen.flatten(0, 1)
    out_TD = swiglu(params, f"{prefix}.shared_experts", x_TD)
    for expert in range(config.n_routed_experts):
        tokens = chosen_TE[:, expert].nonzero()[:, 0]
        rows = swiglu(params, f"{prefix}.experts.{expert}", x_TD[tokens]) * gates_TE[tokens, expert, None]
        out_TD = out_TD.index_add(0, tokens, rows.to(out_TD.dtype))
    return out_TD.view_as(x_BSD), routing


def block(params: Params, layer: int, config: ReferenceConfig, x_BSD: Tensor) -> tuple[Tensor, Routing | None]:
    """Apply one Transformer layer; the routing is None for a dense one."""
    prefix = f"model.layers.{layer}"
    normed = rms_norm(x_BSD, params[f"{prefix}.input_layernorm.weight"], config.rms_norm_eps)
    x_BSD = x_BSD + attention(params, f"{prefix}.self_attn", config, normed)
    normed = rms_norm(x_BSD, params[f"{prefix}.post_attention_layernorm.weight"], config.rms_norm_eps)
    if layer < config.first_k_dense_replace:
        return x_BSD + swiglu(params, f"{prefix}.mlp", normed), None
    out_BSD, routing = mixture(params, f"{prefix}.mlp", config, normed)
    return x_BSD + out_BSD, routing


def main_model(params: Params, config: ReferenceConfig, tokens_BS: Tensor) -> tuple[Tensor, dict[int, Routing]]:
    """Return the main model's output after its final norm [B, S, D], and the routing of each MoE layer."""
    x_BSD = F.embedding(tokens_BS, params["model.embed_tokens.weight"])
    routings: dict[int, Routing] = {}
    for layer in range(config.num_hidden_layers):
        x_BSD, routing = block(params, layer, config, x_BSD)
        if routing is not None:
            routings[layer] = routing
    return rms_norm(x_BSD, params["model.norm.weight"], config.rms_norm_eps), routings


def mtp_module(
    params: Params, depth: int, config: ReferenceConfig, previous_BSD: Tensor, tokens_BS: Tensor
) -> tuple[Tensor, Routing]:
    """Apply MTP module `depth` = 1, 2, ... (eq. 21-23): `tokens_BS` lie `depth` positions after the main inputs.

    `previous_BSD` is normed already: by the main model's final norm, or by the shared-head norm of the module before.
    Returns the state after this module's own shared-head norm, which feeds the head and the next module.
    """
    layer = config.num_hidden_layers + depth - 1
    prefix = f"model.layers.{layer}"
    embedded = F.embedding(tokens_BS, params["model.embed_tokens.weight"])
    embedded = rms_norm(embedded, params[f"{prefix}.enorm.weight"], config.rms_norm_eps)
    previous = rms_norm(previous_BSD, params[f"{prefix}.hnorm.weight"], config.rms_norm_eps)
    x_BSD = F.linear(torch.cat([embedded, previous], dim=-1), params[f"{prefix}.eh_proj.weight"])
    x_BSD, routing = block(params, layer, config, x_BSD)
    assert routing is not None, "the layer of an MTP module always has experts"
    return rms_norm(x_BSD, params[f"{prefix}.shared_head.norm.weight"], config.rms_norm_eps), routing


def logits(params: Params, config: ReferenceConfig, tokens_BS: Tensor) -> Tensor:
    """Return scores of the next token by the main model, [B, S, V]."""
    hidden_BSD, _ = main_model(params, config, tokens_BS)
    return F.linear(hidden_BSD, params["lm_head.weight"])


def summed_cross_entropy(params: Params, hidden_BSD: Tensor, targets_BS: Tensor, counted_BS: Tensor) -> Tensor:
    """Return the head's cross-entropy, in nats, summed over the positions where `counted_BS` holds."""
    logits_TV = at_least_float32(F.linear(hidden_BSD[counted_BS], params["lm_head.weight"]))
    return F.cross_entropy(logits_TV, targets_BS[counted_BS], reduction="sum")


def summed_balance(config: ReferenceConfig, routing: Routing, valid_BS: Tensor) -> Tensor:
    """Return one layer's sequence-wise balance loss (eq. 17-20), summed over sequences. Only P carries a gradient."""
    scores_BSE, valid_BS1 = routing.scores, valid_BS[..., None]
    # A sequence without valid tokens has f = P = 0: the clamp only avoids 0 / 0.
    tokens_B1 = valid_BS.sum(1).clamp(min=1)[:, None].to(scores_BSE.dtype)
    f_BE = (routing.chosen & valid_BS1).sum(1) * config.n_routed_experts / (config.num_experts_per_tok * tokens_B1)
    P_BE = (scores_BSE / scores_BSE.sum(-1, keepdim=True) * valid_BS1).sum(1) / tokens_B1
    return config.balance_alpha * (f_BE * P_BE).sum()


def losses(
    params: Params,
    config: ReferenceConfig,
    tokens_BW: Tensor,
    valid_BW: Tensor,
    total_tokens: int | None = None,
    total_sequences: int | None = None,
) -> Losses:
    """Return the training loss of windows of S + 1 + mtp_depth tokens.

    A target counts where it and its main input position are valid. Main and MTP sums are divided by `total_tokens`, the
    balance loss by `total_sequences`; None takes the valid main targets and the sequences of this very batch. Passing
    those of a global batch makes the losses of its micro-batches add up to the loss of the whole.
    """
    length = tokens_BW.shape[1] - 1 - config.num_nextn_predict_layers
    input_valid_BS = valid_BW[:, :length]

    def shifted(x_BW: Tensor, offset: int) -> Tensor:
        return x_BW[:, offset : offset + length]

    def loss_sum(hidden_BSD: Tensor, offset: int) -> Tensor:
        counted_BS = input_valid_BS & shifted(valid_BW, offset)
        return summed_cross_entropy(params, hidden_BSD, shifted(tokens_BW, offset), counted_BS)

    if total_tokens is None:
        total_tokens = max(int((input_valid_BS & shifted(valid_BW, 1)).sum()), 1)
    if total_sequences is None:
        total_sequences = tokens_BW.shape[0]

    hidden_BSD, routings = main_model(params, config, shifted(tokens_BW, 0))
    main = loss_sum(hidden_BSD, 1) / total_tokens
    mtp = torch.zeros_like(main)
    for depth in range(1, config.num_nextn_predict_layers + 1):
        hidden_BSD, routing = mtp_module(params, depth, config, hidden_BSD, shifted(tokens_BW, depth))
        # Eq. 24 divides by the T of the main loss, though a deeper target may be missing at the end of a sequence.
        mtp = mtp + config.mtp_weight / config.num_nextn_predict_layers * loss_sum(hidden_BSD, depth + 1) / total_tokens
        routings[config.num_hidden_layers + depth - 1] = routing

    balance = torch.zeros_like(main)
    for routing in routings.values():
        balance = balance + summed_balance(config, routing, input_valid_BS) / total_sequences
    counts = {layer: routing.chosen[input_valid_BS].sum(0) for layer, routing in routings.items()}
    return Losses(main + mtp + balance, main, mtp, balance, counts)


def bias_update(bias_E: Tensor, counts_E: Tensor, gamma: float) -> Tensor:
    """Return the routing bias after a step (§2.1.2): `gamma` up where an expert got less than the mean, down for more.

    The sign is that of `total - E * count`, exact in int64; `counts_E` are those of the whole global batch.
    """
    direction_E = torch.sign(counts_E.sum() - counts_E.numel() * counts_E)
    return bias_E + gamma * direction_E.to(bias_E.dtype)
