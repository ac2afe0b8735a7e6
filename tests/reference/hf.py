"""Conversion to and from transformers' DeepSeek-V3, the outside reference."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, modeling_rope_utils
from transformers.modeling_layers import MtpModel
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from shoestring.tests.reference.deepseek_v3 import ReferenceConfig


def transformers_config(config: ReferenceConfig) -> DeepseekV3Config:
    """Return the same model as a transformers config. It has no loss weights."""
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.yarn is not None:
        yarn = config.yarn
        rope |= {"rope_type": "yarn", "factor": yarn.factor, "original_max_position_embeddings": yarn.original_length}
        rope |= {"beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow}
        rope |= {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim}
    return DeepseekV3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        moe_intermediate_size=config.moe_intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        n_shared_experts=config.n_shared_experts,
        n_routed_experts=config.n_routed_experts,
        routed_scaling_factor=config.routed_scaling_factor,
        kv_lora_rank=config.kv_lora_rank,
        q_lora_rank=config.q_lora_rank,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        qk_nope_head_dim=config.qk_nope_head_dim,
        n_group=config.n_group,
        topk_group=config.topk_group,
        num_experts_per_tok=config.num_experts_per_tok,
        first_k_dense_replace=config.first_k_dense_replace,
        norm_topk_prob=config.norm_topk_prob,
        rms_norm_eps=config.rms_norm_eps,
        num_mtp_layers=config.num_nextn_predict_layers,
        rope_parameters=rope,
        max_position_embeddings=round(config.yarn.factor * config.yarn.original_length) if config.yarn else 4096,
        bos_token_id=None,
        eos_token_id=None,
    )


class _TorchWithoutFloat32(ModuleType):
    """The `torch` module, except that FP32 is FP64."""

    def __getattr__(self, name: str) -> object:
        return torch.float64 if name in ("float32", "float") else getattr(torch, name)


@contextmanager
def precision_of(dtype: torch.dtype) -> Iterator[None]:
    """Build and run transformers models of `dtype` (FP32 or FP64) inside this.

    Transformers rounds norms, router, softmax and rotary tables to FP32 in every dtype, which would hide small errors.
    For FP64 its modules see a `torch` whose FP32 is FP64; the formulas stay theirs.
    """
    if dtype != torch.float64:
        yield
        return
    stand_in = _TorchWithoutFloat32("torch")
    with patch.object(modeling_deepseek_v3, "torch", stand_in), patch.object(modeling_rope_utils, "torch", stand_in):
        yield


def fused(params: Mapping[str, Tensor], config: ReferenceConfig) -> dict[str, Tensor]:
    """Convert released names to transformers' in-memory names, where a layer's experts are two stacked tensors."""
    state = {name: value for name, value in params.items() if ".mlp.experts." not in name}
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers + config.num_nextn_predict_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        experts = [f"{prefix}.{expert}" for expert in range(config.n_routed_experts)]
        state[f"{prefix}.gate_up_proj"] = torch.stack(
            [
                torch.cat([params[f"{expert}.gate_proj.weight"], params[f"{expert}.up_proj.weight"]])
                for expert in experts
            ]
        )
        state[f"{prefix}.down_proj"] = torch.stack([params[f"{expert}.down_proj.weight"] for expert in experts])
    return state


def unfused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert back: the inverse of `fused`."""
    params = {}
    for name, value in state.items():
        prefix, experts, matrix = name.partition(".mlp.experts.")
        if not experts:
            params[name] = value
            continue
        for expert, weight in enumerate(value):
            stem = f"{prefix}.mlp.experts.{expert}"
            if matrix == "gate_up_proj":
                params[f"{stem}.gate_proj.weight"], params[f"{stem}.up_proj.weight"] = weight.chunk(2)
            else:
                params[f"{stem}.down_proj.weight"] = weight
    return params


def _layer_of(name: str) -> int:
    """Return the layer index in a released name, -1 for embedding, final norm and head."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else -1


def _disk_name(name: str, config: ReferenceConfig) -> str:
    """Return the released name of a parameter that transformers' MtpModel calls `name`."""
    _, module, rest = name.split(".", 2)
    rest = rest.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
    return f"model.layers.{config.num_hidden_layers + int(module)}.{rest}"


def to_transformers(config: ReferenceConfig, params: Mapping[str, Tensor]) -> DeepseekV3ForCausalLM:
    """Return the main model with these parameters, in their dtype (FP32 or FP64), without those of MTP modules."""
    dtype = params["model.embed_tokens.weight"].dtype
    with precision_of(dtype):
        model = DeepseekV3ForCausalLM(transformers_config(config))
        model.to(dtype)  # type: ignore[arg-type]  # their wrapper hides the signature of Module.to
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")  # the others have no FP64
    state = {name: value for name, value in fused(params, config).items() if _layer_of(name) < config.num_hidden_layers}
    model.load_state_dict(state)
    return model


def to_transformers_mtp(config: ReferenceConfig, params: Mapping[str, Tensor], main: DeepseekV3ForCausalLM) -> MtpModel:
    """Return the MTP modules with these parameters; embedding, head and rotary tables are those of `main`."""
    with precision_of(main.dtype):
        model = MtpModel(main, config.num_nextn_predict_layers)
        model.to(main.dtype)  # type: ignore[arg-type]  # their wrapper hides the signature of Module.to
    on_disk = fused(params, config)
    state = {name: on_disk[_disk_name(name, config)] for name in model.state_dict() if name.startswith("layers.")}
    state |= {
        "embed_tokens.weight": on_disk["model.embed_tokens.weight"],
        "shared_head.weight": on_disk["lm_head.weight"],
    }
    model.load_state_dict(state)
    return model


def gradients_of(model: DeepseekV3ForCausalLM) -> dict[str, Tensor]:
    """Return the gradients of the main model after a backward pass, by released name."""
    return unfused({name: _gradient(parameter) for name, parameter in model.named_parameters()})


def mtp_gradients_of(config: ReferenceConfig, model: MtpModel) -> dict[str, Tensor]:
    """Return the gradients of the MTP modules, by released name; shared tensors are in `gradients_of(main)`."""
    own = {name: parameter for name, parameter in model.named_parameters() if name.startswith("layers.")}
    return unfused({_disk_name(name, config): _gradient(parameter) for name, parameter in own.items()})


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "backward has not reached this parameter"
    return parameter.grad
