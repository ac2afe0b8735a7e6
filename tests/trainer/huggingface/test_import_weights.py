"""Released weights that are damaged or incomplete."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoestring.tests.launch.refusals import refused
from shoestring.tests.trainer.huggingface.small_release import exported, silent
from shoestring.trainer.huggingface.import_weights import import_huggingface_weights


def edited(directory: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def test_all_that_is_missing_or_unknown_is_named_together(tmp_path: Path) -> None:
    _, directory = exported("full", tmp_path)

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # old files hold it
        tensors["model.layers.9.mlp.gate.weight"] = torch.zeros(4)
        del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
        tensors["model.layers.3.embed_tokens.weight"] += 1

    edited(directory, edit)
    found = refused(import_huggingface_weights, directory, tmp_path / "again", silent)
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
    assert (
        "where its header describes"
        in refused(import_huggingface_weights, directory, tmp_path / "again", silent).popitem()[1]
    )
