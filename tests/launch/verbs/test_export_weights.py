"""`shoestring export`: what it writes is read by transformers and imported again, or it is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer, DeepseekV3ForCausalLM

from shoestring.tests.launch.command_line import shoestring
from shoestring.tests.launch.small_checkpoint import SHAPE, TEXT, flip_bit, model
from shoestring.tests.trainer.checkpoint.saved import save_model
from shoestring.trainer.data.tokenizer import END_TOKEN, PAD_TOKEN, Tokenizer
from shoestring.trainer.model.config import YarnConfig
from shoestring.trainer.model.model import Model


def test_export_and_import_carry_the_tokenizer(
    saves: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output, _ = shoestring(capsys, "export", saves, tmp_path / "hf", "--dtype", "fp32", "--max-shard", "100KB")
    assert code == 0
    assert f"Exported {saves / 'checkpoints' / 'step_00000004'}" in output
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs(TEXT[:200])["input_ids"] == tokenizer.encode(TEXT[:200])
    assert (theirs.eos_token, theirs.pad_token) == (END_TOKEN, PAD_TOKEN)
    loaded = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "hf")
    assert (loaded.config.eos_token_id, loaded.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert loaded.config.max_position_embeddings == 32  # what it was trained with
    code, output, _ = shoestring(capsys, "import", tmp_path / "hf", tmp_path / "again")
    assert code == 0
    code, output, _ = shoestring(capsys, "checkpoint", "diff", saves, tmp_path / "again", "--format", "json")
    assert code == 0
    assert "config.model.name: 'tiny' | 'hf'" in json.loads(output)["metadata"]
    code, _, errors = shoestring(capsys, "import", tmp_path / "hf", tmp_path / "again")
    assert code == 2
    assert "holds checkpoints already" in errors
    assert shoestring(capsys, "generate", tmp_path / "again", "--prompt", "word", "--tokens", "2")[0] == 0


def test_the_average_of_the_weights_is_exported_and_generates(
    saves: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The average replaces the weights; routing biases are the model's, because they are not averaged."""
    last, average = model(7), model(8)
    for _, router in last.routers():
        router.bias_E.uniform_(-1, 1)
    attachments = {"tokenizer.json": tokenizer.raw}
    save_model(last, saves / "checkpoints", 7, attachments, average)
    for (_, theirs), (_, own) in zip(average.routers(), last.routers(), strict=True):
        theirs.bias_E.copy_(own.bias_E)
    save_model(average, tmp_path / "alone", 7, attachments)
    assert shoestring(capsys, "export", saves, tmp_path / "hf", "--dtype", "fp32", "--average")[0] == 0
    assert shoestring(capsys, "export", tmp_path / "alone", tmp_path / "expected", "--dtype", "fp32")[0] == 0
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (tmp_path / "expected/model.safetensors").read_bytes()
    greedy: list[str | Path] = ["--prompt", "word1", "--tokens", "12", "--temperature", "0"]
    text = shoestring(capsys, "generate", tmp_path / "alone", *greedy)[1]
    assert shoestring(capsys, "generate", saves, *greedy, "--average")[1] == text
    assert shoestring(capsys, "generate", saves, *greedy)[1] != text
    verbs: list[list[str | Path]] = [["export", saves, tmp_path / "none"], ["generate", saves, *greedy]]
    for verb in verbs:
        code, _, errors = shoestring(capsys, *verb, "--step", "4", "--average")
        assert code == 2
        assert "holds no average of the weights; a run keeps one with optimizer.ema_decay" in errors


def test_an_export_of_a_damaged_checkpoint_is_refused(
    saves: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (part,) = (saves / "checkpoints" / "step_00000004").glob("part_*.safetensors")
    flip_bit(part)
    code, _, errors = shoestring(capsys, "export", saves, tmp_path / "hf")
    assert code == 2
    assert "SHA-256" in errors
    assert shoestring(capsys, "export", saves, tmp_path / "hf", "--step", "2")[0] == 0


def test_a_context_without_end_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(Model(replace(SHAPE, rope_scaling=YarnConfig(factor=1e308))), tmp_path / "checkpoints", 4, {})
    code, _, errors = shoestring(capsys, "export", tmp_path, tmp_path / "out")
    assert code == 2
    assert "model.rope_scaling.factor = 1e+308: cannot be exported" in errors
