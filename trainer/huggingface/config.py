"""`config.json` of a `DeepseekV3ForCausalLM`, in the words of the released one, to and from our `ModelConfig`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from ...comm.refusal import Problem, Refused, refuse_if_any
from ..model.config import ModelConfig, YarnConfig
from .blocks import BLOCK

_SAME = {
    "vocabulary": "vocab_size",
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "dense_layers": "first_k_dense_replace",
    "heads": "num_attention_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "dense_ffn": "intermediate_size",
    "expert_ffn": "moe_intermediate_size",
    "experts": "n_routed_experts",
    "shared_experts": "n_shared_experts",
    "top_k": "num_experts_per_tok",
    "groups": "n_group",
    "top_k_groups": "topk_group",
    "normalise_gates": "norm_topk_prob",
    "routed_scaling": "routed_scaling_factor",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}
"""Ours to theirs, where the meaning is the same."""

_ONE_WAY: Mapping[str, tuple[object, ...]] = {
    "model_type": ("deepseek_v3",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "tie_word_embeddings": (False,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
}
"""What our model does in one way only; keys that are not there have the first value."""

_YARN = {
    "factor": "factor",
    "original_length": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}


def config_json(model: ModelConfig, *, dtype: str, fp8: bool, rope_interleave: bool, context: int) -> dict[str, Any]:
    """The tree of `config.json`. Raises `Refused` for a model that `DeepseekV3ForCausalLM` is not.

    `context` is the sequence length that the model was trained with. Rotary settings are in the released file's form,
    which vLLM and SGLang read, too.
    """
    refuse_if_any(_unknown_there(model))
    tree: dict[str, Any] = {"architectures": ["DeepseekV3ForCausalLM"]}
    tree |= {key: values[0] for key, values in _ONE_WAY.items()}
    tree |= {theirs: model.__dict__[ours] for ours, theirs in _SAME.items()}
    tree |= {
        "num_key_value_heads": model.heads,
        "num_nextn_predict_layers": model.mtp_depth,
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "rope_interleave": rope_interleave,
        "max_position_embeddings": context,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if model.yarn is not None:
        yarn = asdict(model.yarn)
        tree["rope_scaling"] = {"type": "yarn"} | {theirs: yarn[ours] for ours, theirs in _YARN.items()}
        tree["max_position_embeddings"] = round(model.yarn.factor * model.yarn.original_length)
    if fp8:
        tree["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
        }
    return tree


def model_config(tree: Mapping[str, Any], name: str) -> ModelConfig:
    """The shape that a `config.json` describes. Raises `Refused` with everything in it that our model is not."""
    problems = list(_unknown_here(tree))
    if problems:
        raise Refused(problems)
    values = {ours: tree[theirs] for ours, theirs in _SAME.items()}
    # JSON may write 1 for 1.0.
    values |= {key: float(values[key]) for key in ("routed_scaling", "norm_eps", "init_std")}
    rope = rope_settings(tree)
    model = ModelConfig(
        name=name,
        affinity="sigmoid",
        mtp_depth=tree.get("num_nextn_predict_layers", tree.get("num_mtp_layers", 0)) or 0,
        rope_theta=float(rope.get("rope_theta", tree.get("rope_theta", 10000.0))),
        yarn=_yarn(rope) if rope_type(rope) == "yarn" else None,
        **values,
    )
    refuse_if_any(problem.under("config.json") for problem in model.problems())
    return model


def rope_settings(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary settings of a `config.json`: `rope_scaling` before transformers 5, `rope_parameters` since."""
    return tree.get("rope_parameters") or tree.get("rope_scaling") or {}


def rope_type(rope: Mapping[str, Any]) -> str:
    """`default`, `yarn`, or another that we do not have."""
    return str(rope.get("rope_type", rope.get("type", "default")))


def _yarn(rope: Mapping[str, Any]) -> YarnConfig:
    numbers = {ours: float(rope[theirs]) for ours, theirs in _YARN.items() if rope.get(theirs) is not None}
    if not (numbers.get("mscale") and numbers.get("mscale_all_dim")):  # then rotated vectors alone are scaled
        numbers |= {"mscale": 1.0, "mscale_all_dim": 0.0}
    return YarnConfig(original_length=int(numbers.pop("original_length")), **numbers)


def _unknown_there(model: ModelConfig) -> Iterator[Problem]:
    if model.affinity != "sigmoid":
        yield Problem("model.affinity", model.affinity, "cannot be exported: DeepseekV3ForCausalLM has sigmoid alone")
    if model.shared_experts == 0:
        yield Problem("model.shared_experts", 0, "cannot be exported: DeepseekV3ForCausalLM always has shared experts")
    if model.experts // model.groups < 2:
        remedy = f"cannot be exported: DeepseekV3ForCausalLM needs two of the {model.experts} experts in each group"
        yield Problem("model.groups", model.groups, remedy)
    yarn = model.yarn
    if (
        yarn is not None
        and (yarn.mscale, yarn.mscale_all_dim) != (1.0, 0.0)
        and 0 in (yarn.mscale, yarn.mscale_all_dim)
    ):
        remedy = "cannot be exported: a 0 in mscale or mscale_all_dim means 1 and 0 there"
        yield Problem("model.yarn.mscale", yarn.mscale, remedy)


def _unknown_here(tree: Mapping[str, Any]) -> Iterator[Problem]:
    for key, allowed in _ONE_WAY.items():
        if tree.get(key, allowed[0]) not in allowed:
            yield Problem(f"config.json: {key}", tree[key], f"cannot be imported: our model has {allowed[0]!r} alone")
    for key in _SAME.values():
        if key not in tree:  # whoever wrote it relied on defaults, which differ between libraries
            yield Problem(f"config.json: {key}", None, "is missing; write it there, as transformers does when it saves")
    heads = tree.get("num_attention_heads")
    if tree.get("num_key_value_heads", heads) not in (heads, None):
        remedy = f"cannot be imported: latent attention has as many as query heads, {heads}"
        yield Problem("config.json: num_key_value_heads", tree["num_key_value_heads"], remedy)
    yield from _unknown_rotation(rope_settings(tree))
    quantisation = tree.get("quantization_config")
    if quantisation is not None:
        block = quantisation.get("weight_block_size")
        if quantisation.get("quant_method") != "fp8" or list(block or []) != [BLOCK, BLOCK]:
            remedy = f"cannot be imported: only fp8 with weight_block_size [{BLOCK}, {BLOCK}] can"
            yield Problem("config.json: quantization_config", quantisation, remedy)


def _unknown_rotation(rope: Mapping[str, Any]) -> Iterator[Problem]:
    kind = rope_type(rope)
    if kind not in ("default", "yarn"):
        yield Problem("config.json: rope type", kind, "cannot be imported: our model has default and yarn")
    if kind != "yarn":
        return
    for key in ("original_max_position_embeddings", "factor"):
        if key not in rope:
            yield Problem(f"config.json: {key}", None, "is missing from the rotary settings")
    for key, standard in (("attention_factor", None), ("truncate", True)):
        if rope.get(key, standard) != standard:
            yield Problem(f"config.json: {key}", rope[key], f"cannot be imported: our model has {standard} alone")
    if rope.get("mscale_all_dim") and not rope.get("mscale"):
        remedy = "cannot be imported without mscale: our model has both or neither"
        yield Problem("config.json: mscale_all_dim", rope["mscale_all_dim"], remedy)
