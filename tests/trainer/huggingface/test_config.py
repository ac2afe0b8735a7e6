"""`config.json`: ours round-trips, the released one equals ours, and others are refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.tests.launch.refusals import refused
from shoestring.tests.trainer.huggingface.small_release import CONFIGS, exported, silent
from shoestring.tests.trainer.model.released import model_config
from shoestring.trainer.huggingface.config import parse_config_json as config_from_json
from shoestring.trainer.huggingface.config import to_config_json
from shoestring.trainer.huggingface.import_weights import import_huggingface_weights
from shoestring.trainer.model.config import YarnConfig


def test_a_config_comes_back(tmp_path: Path) -> None:
    for name, reference in CONFIGS.items():
        config = model_config(reference)
        tree = to_config_json(config, dtype="bfloat16", fp8=True, rope_interleave=True, max_position_embeddings=64)
        assert config_from_json(json.loads(json.dumps(tree)), config.name) == config, name


def test_the_released_config_is_ours(tmp_path: Path) -> None:
    """The model's part of DeepSeek-V3's config.json on the hub."""
    from shoestring.launch.compose import compose_run_config

    rope = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
    tree: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "ep_size": 1,
        "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
        "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
        "rope_scaling": rope | {"mscale": 1.0, "mscale_all_dim": 1.0}, "rope_theta": 10000,
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4,
        "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    }  # fmt: skip
    expected = compose_run_config(["experiment=quickstart", "model=deepseek_v3", "data.vocab_size=129280"]).model
    assert config_from_json(tree, "deepseek_v3") == replace(expected, rope_scaling=YarnConfig(), initializer_range=0.02)


@pytest.mark.parametrize(
    ("key", "value", "gist"),
    [
        ("hidden_act", "gelu", "only 'silu' is supported"),
        ("attention_bias", True, "only False is supported"),
        ("num_key_value_heads", 2, "as many as query heads"),
        ("topk_method", "greedy", "noaux_tc"),
        ("n_group", 5, "must divide n_routed_experts"),
        ("quantization_config", {"quant_method": "awq"}, "only fp8"),
        ("rope_scaling", {"type": "linear", "factor": 2}, "default and yarn"),
        ("vocab_size", 95, "must have the shape"),
        ("num_nextn_predict_layers", 2, "is in no file"),
        ("num_hidden_layers", 2, "enorm.weight = None: is in no file"),
        ("num_hidden_layers", 2, "config.json and files do not belong together"),
    ],
)
def test_a_config_that_our_model_is_not_is_refused(key: str, value: object, gist: str, tmp_path: Path) -> None:
    _, directory = exported("full", tmp_path)
    tree = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(tree | {key: value}))
    with pytest.raises(ConfigError, match=gist):
        import_huggingface_weights(directory, tmp_path / "again", silent)
    assert not (tmp_path / "again").exists()


def test_a_config_that_leaves_a_choice_to_defaults_is_refused(tmp_path: Path) -> None:
    """No tensor's shape tells how many experts a token has."""
    _, directory = exported("full", tmp_path)
    tree = json.loads((directory / "config.json").read_text())
    for key in ("num_experts_per_tok", "norm_topk_prob", "rms_norm_eps"):
        del tree[key]
    (directory / "config.json").write_text(json.dumps(tree))
    found = refused(import_huggingface_weights, directory, tmp_path / "again", silent)
    assert found.keys() == {f"config.json: {key}" for key in ("num_experts_per_tok", "norm_topk_prob", "rms_norm_eps")}
