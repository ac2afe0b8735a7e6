"""A loaded model: loss, logits and gradients of the reference by released names, text, and directories without one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import shoestring
from shoestring.comm.errors import ConfigError
from shoestring.tests.launch.small_checkpoint import SHAPE, TEXT, model
from shoestring.tests.reference.configs import random_params, reference_configs
from shoestring.tests.reference.deepseek_v3 import is_trained, logits, losses
from shoestring.tests.trainer.checkpoint.saved import save_model, save_params
from shoestring.trainer.data.tokenizer import train_tokenizer
from shoestring.trainer.huggingface.export import ExportOptions, export_checkpoint
from shoestring.trainer.huggingface.import_weights import import_huggingface_weights

TOKENS_BS = torch.randint(0, 96, (3, 24), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", ["full", "two_mtp", "plain_queries"])
def test_loss_and_gradients_are_those_of_the_reference_by_released_name(name: str, tmp_path: Path) -> None:
    config = replace(reference_configs()[name], balance_alpha=0.0)
    params = random_params(config, 3, torch.float32)
    checkpoint = save_params(config, params, tmp_path / "store")
    loaded = shoestring.load(checkpoint.path, dtype=torch.float64)
    for released, weight in loaded.hugging_face_weights().items():
        assert torch.equal(weight, params[released]), released

    wide = {name: value.double().requires_grad_(is_trained(name)) for name, value in params.items()}
    depth = config.num_nextn_predict_layers
    window, valid = F.pad(TOKENS_BS, (0, depth)), F.pad(torch.ones_like(TOKENS_BS, dtype=torch.bool), (0, depth))
    expected = losses(wide, config, window, valid)
    expected.total.backward()
    loss = loaded.loss(TOKENS_BS, mtp_weight=config.mtp_weight)
    torch.testing.assert_close(loss, expected.total.detach(), rtol=1e-6, atol=0)
    (-0.5 * loss).backward()  # a factor reaches what this backward adds, and only that
    loaded.loss(TOKENS_BS, mtp_weight=config.mtp_weight).backward()
    found = loaded.hugging_face_gradients()
    assert found.keys() == {name for name in params if is_trained(name)}
    for released, grad in found.items():
        theirs = wide[released].grad
        assert theirs is not None
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, theirs.float() / 2, rtol=1e-4, atol=1e-7, msg=released)


def test_the_loss_is_the_cross_entropy_of_the_logits(tmp_path: Path) -> None:
    config = reference_configs()["full"]
    params = random_params(config, 3, torch.float32)
    loaded = shoestring.load(save_params(config, params, tmp_path / "store").path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS_BS), logits(params, config, TOKENS_BS), rtol=1e-4, atol=1e-4)
        targets = TOKENS_BS[:, 1:].flatten()
        loss = F.cross_entropy(loaded.logits(TOKENS_BS)[:, :-1].flatten(0, 1), targets)
        torch.testing.assert_close(loaded.loss(TOKENS_BS), loss)
        further = F.cross_entropy(loaded.mtp_logits(TOKENS_BS)[:, :-1].flatten(0, 1), TOKENS_BS[:, 2:].flatten())
        share = TOKENS_BS[:, 2:].numel() / targets.numel()  # the report divides both sums by the same count
        torch.testing.assert_close(loaded.loss(TOKENS_BS, mtp_weight=1.0), loss + further * share)


def test_a_second_backward_and_missing_mtp_are_errors(tmp_path: Path) -> None:
    config = reference_configs()["plain_queries"]
    loaded = shoestring.load(save_params(config, random_params(config, 3, torch.float32), tmp_path / "store").path)
    with pytest.raises(ValueError, match="no MTP module"):
        loaded.mtp_logits(TOKENS_BS)
    loss = loaded.loss(TOKENS_BS)
    assert not loaded.hugging_face_gradients()  # also of the head, whose gradient the forward computes
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


def test_a_run_and_its_import_give_the_same_text(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([TEXT], SHAPE.vocab_size).raw
    saved = save_model(model(1), tmp_path / "run" / "checkpoints", 4, {"tokenizer.json": tokenizer})
    loaded = shoestring.load(tmp_path / "run")
    found = loaded.generate("word1 word2", 8, temperature=0)
    assert len(found.tokens) == 8
    assert loaded.encode(loaded.decode(found.tokens))
    export_checkpoint(saved, tmp_path / "hf", ExportOptions(dtype="fp32"), lambda line: None)
    import_huggingface_weights(tmp_path / "hf", tmp_path / "imported", lambda line: None)
    imported = shoestring.load(tmp_path / "imported")
    assert imported.generate("word1 word2", 8, temperature=0).tokens == found.tokens
    plain = loaded.generate("word1 word2", 8, temperature=0, use_mtp_draft=False)
    assert plain.tokens == found.tokens
    with pytest.raises(ConfigError, match="--temperature = -1: must be finite"):
        loaded.generate("word1", temperature=-1)


def empty(path: Path) -> Path:
    path.mkdir()
    return path


def text_file(path: Path) -> Path:
    path.write_text("none")
    return path


@pytest.mark.parametrize("make", [empty, text_file, lambda path: path, lambda path: str(path)], ids=str)
def test_a_directory_without_a_model_is_one_error(make: object, tmp_path: Path) -> None:
    assert callable(make)
    with pytest.raises(ConfigError) as raised:
        shoestring.load(make(tmp_path / "bad"))
    assert len(raised.value.problems) == 1
    assert "holds no checkpoint; name a run directory, or the directory of one checkpoint" in str(raised.value)
