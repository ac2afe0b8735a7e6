"""Export and import against transformers' DeepseekV3ForCausalLM and the safetensors library."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

from shoestring.comm.errors import ConfigError
from shoestring.parallelism.pipeline.executor import drive
from shoestring.tests.launch.refusals import refused
from shoestring.tests.reference.configs import random_params, reference_configs
from shoestring.tests.reference.deepseek_v3 import ReferenceConfig
from shoestring.tests.reference.hf import to_transformers, to_transformers_mtp
from shoestring.tests.trainer.checkpoint.saved import save_model, save_params
from shoestring.tests.trainer.model.released import model_config
from shoestring.trainer.checkpoint.opened import Checkpoint
from shoestring.trainer.generation.load import load_chunk
from shoestring.trainer.huggingface.blocks import BLOCK
from shoestring.trainer.huggingface.config import config_json
from shoestring.trainer.huggingface.config import model_config as config_from_json
from shoestring.trainer.huggingface.export import INDEX, ExportOptions, export
from shoestring.trainer.huggingface.importing import import_released
from shoestring.trainer.huggingface.names import entries
from shoestring.trainer.model.config import ModelConfig, YarnConfig
from shoestring.trainer.model.model import Model

CONFIGS = reference_configs()
SMALL_SHARDS = 60_000
TOKENS_BS = torch.randint(0, 96, (3, 24), generator=torch.Generator().manual_seed(7))


def silent(_: str) -> None:
    pass


def params_of(name: str, seed: int = 3) -> tuple[ReferenceConfig, dict[str, Tensor]]:
    return CONFIGS[name], random_params(CONFIGS[name], seed, torch.float32)


def exported(name: str, root: Path, **options: Any) -> tuple[Checkpoint, Path]:
    config, params = params_of(name)
    checkpoint = save_params(config, params, root / "store")
    export(checkpoint, root / "out", ExportOptions(**options), silent)
    return checkpoint, root / "out"


def their_model(directory: Path) -> DeepseekV3ForCausalLM:
    model = DeepseekV3ForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    assert isinstance(model, DeepseekV3ForCausalLM)
    return model


@torch.no_grad()
def their_logits(model: DeepseekV3ForCausalLM) -> Tensor:
    logits: Tensor = model(TOKENS_BS).logits
    return logits


@torch.no_grad()
def our_logits(checkpoint: Checkpoint) -> Tensor:
    return drive(load_chunk(checkpoint, torch.device("cpu"), torch.float32).logits(TOKENS_BS))


def on_disk(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


@pytest.mark.parametrize("rope_interleave", [True, False], ids=["pairs", "halves"])
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_an_export_and_its_logits_are_ours(name: str, rope_interleave: bool, tmp_path: Path) -> None:
    options = {"dtype": "fp32", "rope_interleave": rope_interleave, "shard_bytes": SMALL_SHARDS}
    checkpoint, directory = exported(name, tmp_path, **options)
    theirs = their_model(directory)
    expected = their_logits(theirs)
    assert theirs.config.rope_interleave is rope_interleave
    assert 0.5 < expected.std().item() < 2
    assert (our_logits(checkpoint) - expected).abs().max().item() <= 2e-5


@pytest.mark.parametrize("rope_interleave", [True, False], ids=["pairs", "halves"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_saves_is_imported_with_its_logits(name: str, rope_interleave: bool, tmp_path: Path) -> None:
    config, params = params_of(name)
    theirs = to_transformers(config, params)
    theirs.config.rope_interleave = rope_interleave  # the same weights mean another model
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    said: list[str] = []
    path = import_released(tmp_path / "theirs", tmp_path / "store", said.append)
    assert (our_logits(Checkpoint.open(path)) - their_logits(theirs)).abs().max().item() <= 2e-5
    assert any("imported without" in line for line in said) == (config.num_nextn_predict_layers > 0)


@pytest.mark.parametrize("name", ["full", "two_mtp"])
def test_mtp_weights_have_deepseeks_names_and_survive(name: str, tmp_path: Path) -> None:
    config, params = params_of(name)
    checkpoint, directory = exported(name, tmp_path, dtype="fp32")
    found = on_disk(directory)
    extra = {
        f"model.layers.{config.num_hidden_layers + depth}.{copy}.weight"
        for depth in range(config.num_nextn_predict_layers)
        for copy in ("embed_tokens", "shared_head.head")
    }
    assert found.keys() == params.keys() | extra
    for key, value in params.items():
        assert torch.equal(found[key], value), key
    path = import_released(directory, tmp_path / "again", silent)
    assert Checkpoint.open(path).model == replace(checkpoint.model, name="out")
    for key in checkpoint.manifest.tensors:
        assert torch.equal(Checkpoint.open(path).read(key), checkpoint.read(key)), key


@torch.no_grad()
def test_the_mtp_module_of_an_export_gives_our_draft_logits(tmp_path: Path) -> None:
    checkpoint, directory = exported("full", tmp_path, dtype="fp32", shard_bytes=SMALL_SHARDS)
    main = their_model(directory)
    theirs = to_transformers_mtp(CONFIGS["full"], on_disk(directory), main)
    inputs_BS, next_BS = TOKENS_BS[:, :-1], TOKENS_BS[:, 1:]
    chunk = load_chunk(checkpoint, torch.device("cpu"), torch.float32)
    hidden_BSD = drive(chunk.hidden(inputs_BS))
    their_hidden_BSD = main.model(inputs_BS).last_hidden_state
    assert (hidden_BSD - their_hidden_BSD).abs().max().item() <= 2e-5
    positions_1S = torch.arange(inputs_BS.shape[1])[None]
    further_BSD = theirs.forward_layer(0, their_hidden_BSD, positions_1S, None, input_ids=next_BS)
    expected = main.lm_head(further_BSD)
    assert (drive(chunk.draft(hidden_BSD, next_BS)) - expected).abs().max().item() <= 2e-5


def test_a_sharded_export_has_an_index_that_transformers_and_the_library_read(tmp_path: Path) -> None:
    _, directory = exported("full", tmp_path, shard_bytes=SMALL_SHARDS)
    index = json.loads((directory / INDEX).read_text())
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    total = 0
    for name, file in index["weight_map"].items():
        with safe_open(directory / file, "pt") as opened:
            tensor = opened.get_tensor(name)
            assert opened.metadata() == {"format": "pt"}
        assert tensor.dtype == (torch.float32 if name.endswith("_bias") else torch.bfloat16)
        total += tensor.nbytes
    assert index["metadata"]["total_size"] == total
    assert max((directory / file).stat().st_size for file in files) < SMALL_SHARDS + 20_000


WIDE = ModelConfig(
    name="wide",
    vocab_size=96,
    hidden_size=160,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=136,
    kv_lora_rank=32,
    qk_nope_head_dim=48,
    qk_rope_head_dim=16,
    v_head_dim=72,
    intermediate_size=200,
    moe_intermediate_size=136,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=2,
    num_nextn_predict_layers=1,
)
"""Wider than a block and not a multiple of it."""


def wide_model(shape: ModelConfig = WIDE) -> Model:
    generator = torch.Generator().manual_seed(1)
    model = Model(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.ndim == 1 else noise * parameter.shape[-1] ** -0.5)
            if parameter.ndim == 2 and parameter.shape[0] > BLOCK:
                parameter[BLOCK:] *= 1000  # a scale for all would lose the first block
        for _, router in model.routers():
            router.bias_E.copy_(torch.arange(4) / 10)
    return model


def dequantized(tensors: dict[str, Tensor], name: str) -> Tensor:
    """An element at a time, by the words of README_WEIGHTS: each block of 128 × 128 times its `weight_scale_inv`."""
    scale = tensors[f"{name}_scale_inv"].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    rows, columns = tensors[name].shape
    return tensors[name].float() * scale[:rows, :columns]


def test_fp8_blocks_keep_weights_within_the_formats_rounding(tmp_path: Path) -> None:
    checkpoint = save_model(wide_model(), tmp_path / "store")
    export(checkpoint, tmp_path / "fp8", ExportOptions("fp8"), silent)
    export(checkpoint, tmp_path / "fp32", ExportOptions("fp32"), silent)
    fp8, fp32 = on_disk(tmp_path / "fp8"), on_disk(tmp_path / "fp32")
    quantized = [name for name in fp8 if fp8[name].dtype == torch.float8_e4m3fn]
    kinds = {name.split(".")[-2] for name in quantized}
    assert kinds == {
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert {name.removesuffix("_scale_inv") for name in fp8 if name.endswith("_scale_inv")} == set(quantized)
    again = Checkpoint.open(import_released(tmp_path / "fp8", tmp_path / "again", silent))
    export(again, tmp_path / "again_fp32", ExportOptions("fp32"), silent)
    found = on_disk(tmp_path / "again_fp32")
    for name, exact in fp32.items():
        if name not in quantized:
            assert torch.equal(found[name], exact if name.endswith("_bias") else exact.bfloat16().float()), name
            continue
        assert torch.equal(found[name], dequantized(fp8, name)), name
        rows, columns = exact.shape
        padded = torch.nn.functional.pad(exact.abs(), (0, -columns % BLOCK, 0, -rows % BLOCK))
        largest = torch.nn.functional.max_pool2d(padded[None], BLOCK)[0]  # of each block
        largest = largest.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
        allowed = torch.maximum(exact.abs() / 16, largest / 448 / 1024)
        assert ((found[name] - exact).abs() <= allowed * 1.0001).all(), name
    export(again, tmp_path / "again_fp8", ExportOptions("fp8"), silent)
    twice = on_disk(tmp_path / "again_fp8")
    assert all(torch.equal(twice[name].view(torch.uint8), fp8[name].view(torch.uint8)) for name in quantized)


def test_transformers_reads_an_fp8_export_as_we_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it makes BF16 of it, where every side is a multiple of the number of its blocks."""
    # Asked for before weights are dequantized on a CPU, and not used for that.
    monkeypatch.setattr("transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: True)
    shape = replace(
        WIDE,
        hidden_size=256,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=64,
        qk_rope_head_dim=64,
        v_head_dim=64,
        intermediate_size=256,
        moe_intermediate_size=128,
    )
    export(save_model(wide_model(shape), tmp_path / "store"), tmp_path / "fp8", ExportOptions("fp8"), silent)
    again = Checkpoint.open(import_released(tmp_path / "fp8", tmp_path / "again", silent))
    theirs = their_model(tmp_path / "fp8").state_dict()
    compared = 0
    for entry in entries(again.model):
        found, expert = again.read(entry.name), entry.name.partition("/expert_")[2]
        if entry.layer >= again.model.num_hidden_layers and entry.layer < 10:
            continue  # MTP
        if expert:
            kind = "gate_up_proj" if "gate_up" in entry.name else "down_proj"
            expected = theirs[f"model.layers.{entry.layer}.mlp.experts.{kind}"][int(expert)]
        else:
            expected = torch.cat([theirs[name] for name in entry.released])
        assert torch.equal(found.to(expected.dtype), expected), entry.name
        compared += 1
    assert compared == sum(not name.startswith("model/mtp.") for name in again.manifest.tensors)


def test_a_config_comes_back(tmp_path: Path) -> None:
    for name, reference in CONFIGS.items():
        config = model_config(reference)
        tree = config_json(config, dtype="bfloat16", fp8=True, rope_interleave=True, context=64)
        assert config_from_json(json.loads(json.dumps(tree)), config.name) == config, name


def test_the_released_config_is_ours(tmp_path: Path) -> None:
    """What the hub's config.json of DeepSeek-V3 says, as far as it concerns the model."""
    from shoestring.launch.compose import compose_run

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
    expected = compose_run(["experiment=quickstart", "model=deepseek_v3", "data.vocabulary=129280"]).model
    assert config_from_json(tree, "deepseek_v3") == replace(expected, rope_scaling=YarnConfig(), initializer_range=0.02)


@pytest.mark.parametrize(
    ("key", "value", "gist"),
    [
        ("hidden_act", "gelu", "our model has 'silu' alone"),
        ("attention_bias", True, "our model has False alone"),
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
        import_released(directory, tmp_path / "again", silent)
    assert not (tmp_path / "again").exists()


def test_a_config_that_leaves_a_choice_to_defaults_is_refused(tmp_path: Path) -> None:
    """No tensor's shape tells how many experts a token has."""
    _, directory = exported("full", tmp_path)
    tree = json.loads((directory / "config.json").read_text())
    for key in ("num_experts_per_tok", "norm_topk_prob", "rms_norm_eps"):
        del tree[key]
    (directory / "config.json").write_text(json.dumps(tree))
    found = refused(import_released, directory, tmp_path / "again", silent)
    assert found.keys() == {f"config.json: {key}" for key in ("num_experts_per_tok", "norm_topk_prob", "rms_norm_eps")}


def edited(directory: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def test_all_that_is_missing_or_unknown_is_named_at_once(tmp_path: Path) -> None:
    _, directory = exported("full", tmp_path)

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # old files hold it
        tensors["model.layers.9.mlp.gate.weight"] = torch.zeros(4)
        del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
        tensors["model.layers.3.embed_tokens.weight"] += 1

    edited(directory, edit)
    found = refused(import_released, directory, tmp_path / "again", silent)
    assert found.keys() == {
        "model.layers.9.mlp.gate.weight",
        "model.layers.1.mlp.experts.3.up_proj.weight",
        "model.layers.3.embed_tokens.weight",
    }
    assert "must equal model.embed_tokens.weight" in found["model.layers.3.embed_tokens.weight"]


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    _, directory = exported("full", tmp_path)
    raw = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(raw[:-1])
    assert "where its header describes" in refused(import_released, directory, tmp_path / "again", silent).popitem()[1]


def test_an_export_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    config, params = params_of("full")
    checkpoint = save_params(config, params, tmp_path / "store")
    (part,) = checkpoint.path.glob("part_*.safetensors")
    raw = bytearray(part.read_bytes())
    raw[-1] ^= 1
    part.write_bytes(raw)
    with pytest.raises(ConfigError, match="SHA-256"):
        export(checkpoint, tmp_path / "out", ExportOptions(), silent)
    assert {path.name for path in tmp_path.iterdir()} == {"store"}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="not empty"):
        export(checkpoint, tmp_path / "full", ExportOptions(), silent)


def test_models_that_transformers_does_not_have_are_refused(tmp_path: Path) -> None:
    softmax = replace(WIDE, scoring_func="softmax", n_shared_experts=0, n_group=4, topk_group=4)
    found = refused(export, save_model(Model(softmax), tmp_path / "s"), tmp_path / "out", ExportOptions(), silent)
    assert found.keys() == {"model.scoring_func", "model.n_shared_experts", "model.n_group"}


def test_weights_that_are_not_finite_are_not_made_fp8(tmp_path: Path) -> None:
    model = wide_model()
    with torch.no_grad():
        dict(model.named_parameters())["layers.0.ffn.down.weight"][3, 5] = float("inf")
    checkpoint = save_model(model, tmp_path / "store")
    found = refused(export, checkpoint, tmp_path / "out", ExportOptions("fp8"), silent)
    assert list(found) == ["model.layers.0.mlp.down_proj.weight"]
