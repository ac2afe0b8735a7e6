"""Weights in FP8 with a scale for each block, as the released checkpoint stores them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shoestring.comm.fp8 import TILE_WIDTH
from shoestring.tests.launch.refusals import refused
from shoestring.tests.trainer.checkpoint.saved import save_model
from shoestring.tests.trainer.huggingface.small_release import WIDE, on_disk, silent, their_model
from shoestring.trainer.checkpoint.checkpoint import Checkpoint
from shoestring.trainer.huggingface.export import ExportOptions, export_checkpoint
from shoestring.trainer.huggingface.import_weights import import_huggingface_weights
from shoestring.trainer.huggingface.tensor_names import make_tensor_mappings
from shoestring.trainer.model.config import ModelConfig
from shoestring.trainer.model.model import Model


def wide_model(shape: ModelConfig = WIDE) -> Model:
    generator = torch.Generator().manual_seed(1)
    model = Model(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.ndim == 1 else noise * parameter.shape[-1] ** -0.5)
            if parameter.ndim == 2 and parameter.shape[0] > TILE_WIDTH:
                parameter[TILE_WIDTH:] *= 1000  # a scale for all would lose the first block
        for _, router in model.routers():
            router.bias_E.copy_(torch.arange(4) / 10)
    return model


def dequantized(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Dequantize element by element, as README_WEIGHTS says: each block of 128 × 128 times its `weight_scale_inv`."""
    scale = tensors[f"{name}_scale_inv"].repeat_interleave(TILE_WIDTH, 0).repeat_interleave(TILE_WIDTH, 1)
    rows, columns = tensors[name].shape
    return tensors[name].float() * scale[:rows, :columns]


def test_fp8_blocks_keep_weights_within_the_formats_rounding(tmp_path: Path) -> None:
    checkpoint = save_model(wide_model(), tmp_path / "store")
    export_checkpoint(checkpoint, tmp_path / "fp8", ExportOptions("fp8"), silent)
    export_checkpoint(checkpoint, tmp_path / "fp32", ExportOptions("fp32"), silent)
    fp8, fp32 = on_disk(tmp_path / "fp8"), on_disk(tmp_path / "fp32")
    quantized = [name for name in fp8 if fp8[name].dtype == torch.float8_e4m3fn]
    kinds = {name.split(".")[-2] for name in quantized}
    assert kinds == {
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert {name.removesuffix("_scale_inv") for name in fp8 if name.endswith("_scale_inv")} == set(quantized)
    again = Checkpoint.open(import_huggingface_weights(tmp_path / "fp8", tmp_path / "again", silent))
    export_checkpoint(again, tmp_path / "again_fp32", ExportOptions("fp32"), silent)
    found = on_disk(tmp_path / "again_fp32")
    for name, exact in fp32.items():
        if name not in quantized:
            assert torch.equal(found[name], exact if name.endswith("_bias") else exact.bfloat16().float()), name
            continue
        assert torch.equal(found[name], dequantized(fp8, name)), name
        rows, columns = exact.shape
        padded = torch.nn.functional.pad(exact.abs(), (0, -columns % TILE_WIDTH, 0, -rows % TILE_WIDTH))
        largest = torch.nn.functional.max_pool2d(padded[None], TILE_WIDTH)[0]  # of each block
        largest = largest.repeat_interleave(TILE_WIDTH, 0).repeat_interleave(TILE_WIDTH, 1)[:rows, :columns]
        allowed = torch.maximum(exact.abs() / 16, largest / 448 / 1024)
        assert ((found[name] - exact).abs() <= allowed * 1.0001).all(), name
    export_checkpoint(again, tmp_path / "again_fp8", ExportOptions("fp8"), silent)
    twice = on_disk(tmp_path / "again_fp8")
    assert all(torch.equal(twice[name].view(torch.uint8), fp8[name].view(torch.uint8)) for name in quantized)


def test_transformers_reads_an_fp8_export_as_we_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers dequantizes it to BF16 on a CPU if every side is a multiple of the number of its blocks."""
    # transformers asks for it before it dequantizes on a CPU, and does not use it for that.
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
    export_checkpoint(save_model(wide_model(shape), tmp_path / "store"), tmp_path / "fp8", ExportOptions("fp8"), silent)
    again = Checkpoint.open(import_huggingface_weights(tmp_path / "fp8", tmp_path / "again", silent))
    theirs = their_model(tmp_path / "fp8").state_dict()
    compared = 0
    for entry in make_tensor_mappings(again.model_config):
        found, expert = again.read_tensor(entry.name), entry.name.partition("/expert_")[2]
        if entry.layer_index >= again.model_config.num_hidden_layers and entry.layer_index < 10:
            continue  # MTP
        if expert:
            kind = "gate_up_proj" if "gate_up" in entry.name else "down_proj"
            expected = theirs[f"model.layers.{entry.layer_index}.mlp.experts.{kind}"][int(expert)]
        else:
            expected = torch.cat([theirs[name] for name in entry.hf_names])
        assert torch.equal(found.to(expected.dtype), expected), entry.name
        compared += 1
    assert compared == sum(not name.startswith("model/mtp.") for name in again.manifest.tensors)


def test_weights_that_are_not_finite_are_not_made_fp8(tmp_path: Path) -> None:
    model = wide_model()
    with torch.no_grad():
        dict(model.named_parameters())["layers.0.ffn.down.weight"][3, 5] = float("inf")
    checkpoint = save_model(model, tmp_path / "store")
    found = refused(export_checkpoint, checkpoint, tmp_path / "out", ExportOptions("fp8"), silent)
    assert list(found) == ["model.layers.0.mlp.down_proj.weight"]
