"""An export: in shards, whole or not at all, and of models that transformers has."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from shoestring.comm.errors import ConfigError
from shoestring.tests.launch.refusals import refused
from shoestring.tests.trainer.checkpoint.saved import save_model, save_params
from shoestring.tests.trainer.huggingface.small_release import SMALL_SHARDS, WIDE, exported, params_of, silent
from shoestring.trainer.huggingface.export import WEIGHT_INDEX_FILE, ExportOptions, export_checkpoint
from shoestring.trainer.model.model import Model


def test_a_sharded_export_has_an_index_that_transformers_and_the_library_read(tmp_path: Path) -> None:
    _, directory = exported("full", tmp_path, shard_bytes=SMALL_SHARDS)
    index = json.loads((directory / WEIGHT_INDEX_FILE).read_text())
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


def test_an_export_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    config, params = params_of("full")
    checkpoint = save_params(config, params, tmp_path / "store")
    (part,) = checkpoint.path.glob("part_*.safetensors")
    raw = bytearray(part.read_bytes())
    raw[-1] ^= 1
    part.write_bytes(raw)
    with pytest.raises(ConfigError, match="SHA-256"):
        export_checkpoint(checkpoint, tmp_path / "out", ExportOptions(), silent)
    assert {path.name for path in tmp_path.iterdir()} == {"store"}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="not empty"):
        export_checkpoint(checkpoint, tmp_path / "full", ExportOptions(), silent)


def test_models_that_transformers_does_not_have_are_refused(tmp_path: Path) -> None:
    softmax = replace(WIDE, scoring_func="softmax", n_shared_experts=0, n_group=4, topk_group=4)
    found = refused(
        export_checkpoint, save_model(Model(softmax), tmp_path / "s"), tmp_path / "out", ExportOptions(), silent
    )
    assert found.keys() == {"model.scoring_func", "model.n_shared_experts", "model.n_group"}
