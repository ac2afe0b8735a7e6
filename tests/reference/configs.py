"""Small configurations that between them turn each switch of the model on and off, and random parameters for them."""

from dataclasses import replace

import torch
from torch import Tensor

from shoestring.tests.reference.deepseek_v3 import BIAS, ReferenceConfig
from shoestring.tests.reference.rotary import Yarn


def reference_configs() -> dict[str, ReferenceConfig]:
    """Return small configurations which between them turn each switch of the model on and off.

    `balance_alpha` and `mtp_weight` are large, so that an error in the small terms of the loss is seen.
    """
    full = ReferenceConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=4,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=12,
        intermediate_size=48,
        moe_intermediate_size=16,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        num_nextn_predict_layers=1,
        balance_alpha=0.1,
        mtp_weight=0.3,
    )
    return {
        "full": full,
        "plain_queries": replace(full, q_lora_rank=None, first_k_dense_replace=0, num_nextn_predict_layers=0),
        "one_group": replace(
            full,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=3,
            num_hidden_layers=2,
            first_k_dense_replace=0,
            v_head_dim=16,
        ),
        "raw_gates": replace(
            full, norm_topk_prob=False, routed_scaling_factor=1.0, n_shared_experts=2, num_nextn_predict_layers=0
        ),
        # Of 8 pairs, one keeps its frequency, two are mixed and five stretched; 9 tokens are already too many.
        "yarn": replace(
            full, qk_rope_head_dim=16, yarn=Yarn(factor=4.0, original_length=8, beta_fast=1.2, beta_slow=0.1)
        ),
        "yarn_magnitudes": replace(
            full,
            q_lora_rank=None,
            yarn=Yarn(8.0, 8, beta_fast=1.2, beta_slow=0.1, mscale=1.0, mscale_all_dim=0.5),
            rope_theta=500.0,
            rms_norm_eps=1e-5,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            num_nextn_predict_layers=0,
        ),
        "two_mtp": replace(full, num_hidden_layers=2, num_nextn_predict_layers=2),
    }


def parameter_shapes(config: ReferenceConfig) -> dict[str, tuple[int, ...]]:
    """Return each parameter's shape by released name, routing biases included, in layer order."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_width = config.qk_nope_head_dim + config.qk_rope_head_dim

    def ffn(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}.gate_proj.weight": (width, hidden),
            f"{prefix}.up_proj.weight": (width, hidden),
            f"{prefix}.down_proj.weight": (hidden, width),
        }

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        prefix = f"model.layers.{layer}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        if layer >= config.num_hidden_layers:
            shapes |= {f"{prefix}.{norm}.weight": (hidden,) for norm in ("enorm", "hnorm", "shared_head.norm")}
            shapes[f"{prefix}.eh_proj.weight"] = (hidden, 2 * hidden)
        shapes |= {f"{prefix}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
        if config.q_lora_rank is None:
            shapes[f"{attention}.q_proj.weight"] = (heads * head_width, hidden)
        else:
            shapes[f"{attention}.q_a_proj.weight"] = (config.q_lora_rank, hidden)
            shapes[f"{attention}.q_a_layernorm.weight"] = (config.q_lora_rank,)
            shapes[f"{attention}.q_b_proj.weight"] = (heads * head_width, config.q_lora_rank)
        shapes[f"{attention}.kv_a_proj_with_mqa.weight"] = (config.kv_lora_rank + config.qk_rope_head_dim, hidden)
        shapes[f"{attention}.kv_a_layernorm.weight"] = (config.kv_lora_rank,)
        expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
        shapes[f"{attention}.kv_b_proj.weight"] = (expanded, config.kv_lora_rank)
        shapes[f"{attention}.o_proj.weight"] = (hidden, heads * config.v_head_dim)
        if layer < config.first_k_dense_replace:
            shapes |= ffn(mlp, config.intermediate_size)
            continue
        shapes[f"{mlp}.gate.weight"] = (config.n_routed_experts, hidden)
        shapes[f"{prefix}.{BIAS}"] = (config.n_routed_experts,)
        shapes |= ffn(f"{mlp}.shared_experts", config.n_shared_experts * config.moe_intermediate_size)
        for expert in range(config.n_routed_experts):
            shapes |= ffn(f"{mlp}.experts.{expert}", config.moe_intermediate_size)
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (config.vocab_size, hidden)}


def random_params(config: ReferenceConfig, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return parameters whose logits have a standard deviation of about 1; norms and routing biases are not trivial.

    The values are drawn in FP64, so those of two dtypes differ by rounding only. Routing biases are FP32 in every
    dtype, as in the released checkpoint.
    """
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for name, shape in parameter_shapes(config).items():
        noise = torch.randn(shape, dtype=torch.float64, generator=generator)
        if name.endswith(BIAS):
            params[name] = (0.1 * noise).float()
        elif len(shape) == 1:
            params[name] = (1 + 0.1 * noise).to(dtype)
        else:
            spread = 1.0 if name == "model.embed_tokens.weight" else shape[1] ** -0.5
            params[name] = (spread * noise).to(dtype)
    return params
