"""`shoestring import` of a `config.json` of another program: it is read exactly, or refused by its key."""

import os
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from shoestring.tests.launch.command_line import shoestring
from shoestring.tests.launch.verbs.refused_import import edit_config, refused_import

YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("values", "gist"),
    [
        ({"hidden_size": "16"}, "hidden_size = '16': must be a whole number"),
        ({"hidden_size": 16.0}, "hidden_size = 16.0: must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True: must be a whole number"),
        ({"vocab_size": None}, "vocab_size = None: must be a whole number"),
        ({"n_routed_experts": [8]}, "n_routed_experts = [8]: must be a whole number"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps = '1e-6': must be a number"),
        ({"norm_topk_prob": 1}, "norm_topk_prob = 1: must be true or false"),
        ({"attention_bias": 0}, "attention_bias = 0: cannot be imported"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_scaling": {"type": "yarn", "factor": "2"}}, "factor = '2': must be a number"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "original_max_position_embeddings = None: is missing"),
        ({"rope_scaling": {"type": ["yarn"]}}, "type = ['yarn']: must be text"),
        ({"quantization_config": "fp8"}, "only fp8 with weight_block_size"),
        ({"hidden_size": 10**5}, "the largest dimension of any tensor is 300"),
        ({"n_routed_experts": 4096}, "do not belong together"),
        ({"num_hidden_layers": 4096}, "do not belong together"),
        ({"hidden_size": 10**30}, "must be from 0 to"),
        ({"q_lora_rank": -1}, "q_lora_rank = -1: must be from 0"),
        ({"num_nextn_predict_layers": "1"}, "num_nextn_predict_layers = '1': must be a whole number"),
        ({"eos_token_id": "2"}, "eos_token_id = '2': must be a whole number"),
        ({"eos_token_id": [1, None]}, "eos_token_id[1] = None: must be a whole number"),
        ({"max_position_embeddings": 0}, "max_position_embeddings = 0: must be from 1"),
        ({"rope_interleave": "yes"}, "rope_interleave = 'yes': must be true or false"),
        ({"rope_scaling": YARN | {"factor": 1e308}}, "factor = 1e+308: must be from 0 to"),
        ({"rope_scaling": YARN | {"factor": 2.0**20}}, "exceeds 2147483648 positions"),
        ({"rope_scaling": YARN | {"factor": 10**400}}, "must be a finite number"),
        ({"rope_scaling": YARN | {"mscale": 1e300}}, "mscale = 1e+300: must be from 0 to 1000"),
        ({"routed_scaling_factor": 1e300}, "routed_scaling_factor = 1e+300: must be from 0 to 1e+06"),
        ({"rope_theta": 1e300}, "rope_theta = 1e+300: must be from 0 to 1e+18"),
        ({"architectures": 5}, "architectures = 5: must be a list"),
        ({"architectures": ["LlamaForCausalLM"]}, "only DeepseekV3ForCausalLM is supported"),
        ({"torch_dtype": 7}, "torch_dtype = 7: must be text"),
        ({"dtype": {"x": 1}}, "dtype = {'x': 1}: must be text"),
        ({"dtype": "int8"}, "dtype = 'int8': must be one of bfloat16"),
        ({"eos_token_id": 999999}, "eos_token_id = 999999: must be from -1 to 299"),
        ({"eos_token_id": [1, 300]}, "eos_token_id[1] = 300: must be from 0 to 299"),
        ({"bos_token_id": 300}, "bos_token_id = 300: must be from -1 to 299"),
    ],
)  # fmt: skip
def test_a_config_json_of_wrong_values_is_refused(
    values: dict[str, object], gist: str, hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(hf, **values)
    assert gist in refused_import(capsys, hf)


@pytest.mark.parametrize(
    ("raw", "gist"),
    [
        (b"", "is not JSON"),
        (b"[]", "must be a mapping"),
        (b"\xff\xfe", "is not UTF-8"),
        (b'{"a":' * 50_000, "nested more than 64 deep"),
        (b'{"hidden_size": 1, "hidden_size": 2}', "is a repeated key"),
        (b'{"rope_theta": Infinity}', "numbers must be finite"),
        (b'{"not_read": 1e999}', "1e999': is larger than any finite number"),
        (b'{"quantization_config": {"x": [-1e999]}}', "-1e999': is larger than any finite number"),
        (b"\xef\xbb\xbf{}", "begins with a byte order mark"),
    ],
)
def test_a_config_json_that_is_none_is_refused(
    raw: bytes, gist: str, hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (hf / "config.json").write_bytes(raw)
    assert gist in refused_import(capsys, hf)


def test_a_config_json_or_index_is_read_to_a_bound(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "model.safetensors.index.json"):
        (hf / name).touch()
        size = (hf / name).stat().st_size
        os.truncate(hf / name, 2**29)
        errors = refused_import(capsys, hf)
        assert f"{name} = 536870912: is too large" in errors
        os.truncate(hf / name, size)


def test_the_same_values_are_still_imported(hf: Path, original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Strict types let equal values through: 1 for 1.0, and null for none."""
    edit_config(hf, routed_scaling_factor=2, rope_scaling=None, num_key_value_heads=None, eos_token_id=None)
    code, output, errors = shoestring(capsys, "import", hf, hf.parent / "again")
    assert code == 0, errors
    tensors: dict[str, Tensor] = load_file(hf / "model.safetensors")
    assert f"Imported to {hf.parent / 'again'}" in output
    assert len(tensors) > 10


def test_a_generation_config_beyond_every_number_is_named(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (hf / "generation_config.json").write_text('{"temperature": 1e999}')
    assert "generation_config.json = '1e999': is larger than any finite number" in refused_import(capsys, hf)


@pytest.mark.parametrize("to", ["nowhere", "config.json"], ids=["dangling", "circular"])
def test_a_config_json_that_leads_nowhere_is_a_link(to: str, hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (hf / "config.json").unlink()
    (hf / "config.json").symlink_to(to)
    assert f"config.json = 'a link to {to}': leads to no file" in refused_import(capsys, hf)
