"""Export and import against transformers' DeepseekV3ForCausalLM and the safetensors library."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

from shoestring.parallelism.pipeline.instruction import run_to_completion
from shoestring.tests.reference.hf import to_transformers, to_transformers_mtp
from shoestring.tests.trainer.huggingface.small_release import (
    CONFIGS,
    SMALL_SHARDS,
    exported,
    on_disk,
    params_of,
    silent,
    their_model,
)
from shoestring.trainer.checkpoint.checkpoint import Checkpoint
from shoestring.trainer.generation.load import load_chunk_for_inference
from shoestring.trainer.huggingface.import_weights import import_huggingface_weights

TOKENS_BS = torch.randint(0, 96, (3, 24), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def their_logits(model: DeepseekV3ForCausalLM) -> Tensor:
    logits: Tensor = model(TOKENS_BS).logits
    return logits


@torch.no_grad()
def our_logits(checkpoint: Checkpoint) -> Tensor:
    return run_to_completion(
        load_chunk_for_inference(checkpoint, torch.device("cpu"), torch.float32).compute_logits(TOKENS_BS)
    )


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
    path = import_huggingface_weights(tmp_path / "theirs", tmp_path / "store", said.append)
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
    path = import_huggingface_weights(directory, tmp_path / "again", silent)
    assert Checkpoint.open(path).model_config == replace(checkpoint.model_config, name="out")
    for key in checkpoint.manifest.tensors:
        assert torch.equal(Checkpoint.open(path).read_tensor(key), checkpoint.read_tensor(key)), key


@torch.no_grad()
def test_the_mtp_module_of_an_export_gives_our_draft_logits(tmp_path: Path) -> None:
    checkpoint, directory = exported("full", tmp_path, dtype="fp32", shard_bytes=SMALL_SHARDS)
    main = their_model(directory)
    theirs = to_transformers_mtp(CONFIGS["full"], on_disk(directory), main)
    inputs_BS, next_BS = TOKENS_BS[:, :-1], TOKENS_BS[:, 1:]
    chunk = load_chunk_for_inference(checkpoint, torch.device("cpu"), torch.float32)
    hidden_BSD = run_to_completion(chunk.compute_hidden_states(inputs_BS))
    their_hidden_BSD = main.model(inputs_BS).last_hidden_state
    assert (hidden_BSD - their_hidden_BSD).abs().max().item() <= 2e-5
    positions_1S = torch.arange(inputs_BS.shape[1])[None]
    further_BSD = theirs.forward_layer(0, their_hidden_BSD, positions_1S, None, input_ids=next_BS)
    expected = main.lm_head(further_BSD)
    assert (run_to_completion(chunk.compute_mtp_logits(hidden_BSD, next_BS)) - expected).abs().max().item() <= 2e-5
