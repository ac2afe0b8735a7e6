"""`shoestring checkpoint`, `export`, `import` and `generate`, as a user runs them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
from transformers import AutoTokenizer, DeepseekV3ForCausalLM

from shoestring.tests.launch.command_line import shoestring
from shoestring.tests.launch.small_checkpoint import SHAPE, TEXT, fifo, folder
from shoestring.tests.trainer.checkpoint.saved import save_model
from shoestring.trainer.checkpoint.store import CheckpointStore
from shoestring.trainer.data.tokenizer import END, PAD, Tokenizer, train_tokenizer
from shoestring.trainer.model.config import ModelConfig
from shoestring.trainer.model.init import initialize
from shoestring.trainer.model.model import Model


def model(seed: int) -> Model:
    made = Model(SHAPE)
    initialize(made, seed)
    return made


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT], 300)


@pytest.fixture(scope="module")
def original(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2 and 4."""
    run = tmp_path_factory.mktemp("run")
    attachments = {"tokenizer.json": tokenizer.to_json().encode()}
    for step in (2, 4):
        save_model(model(step), run / "checkpoints", step, attachments)
    return run


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


def flip_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def test_ls_tells_whole_from_damaged_from_unfinished(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = CheckpointStore(run / "checkpoints", keep=9)
    (store.path(4) / "complete").unlink()
    with patch("shoestring.trainer.checkpoint.manifest.FORMAT", 4):
        save_model(model(5), run / "checkpoints", 5)
    store.partial(6).mkdir()  # now, for the next save clears it
    code, output, _ = shoestring(capsys, "checkpoint", "ls", run, "--format", "json")
    assert code == 0
    states = {each["name"]: each["state"] for each in json.loads(output)}
    assert states.keys() == {"step_00000002", "step_00000004", "step_00000005", "step_00000006.partial"}
    assert "this version reads format 3" in states["step_00000005"]
    assert states["step_00000002"] == "whole"
    assert states["step_00000004"].startswith("damaged: ")
    assert states["step_00000006.partial"].startswith("unfinished")
    assert "step_00000002" in shoestring(capsys, "checkpoint", "ls", run)[1]


def test_verify_reads_every_byte(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, _ = shoestring(capsys, "checkpoint", "verify", run)
    assert code == 0
    assert "step_00000004" in output
    assert "every hash and every header is right" in output
    (part,) = (run / "checkpoints" / "step_00000004").glob("part_*.safetensors")
    flip_bit(part)
    code, output, _ = shoestring(capsys, "checkpoint", "verify", run)
    assert code == 1
    assert str(part) in output
    assert shoestring(capsys, "checkpoint", "verify", run, "--step", "2")[0] == 0


def unlink(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def change(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize("harm", [unlink, truncate, lengthen, change, folder, fifo, link_to_itself])
@pytest.mark.parametrize("name", ["part_00000.safetensors", "tokenizer.json", "manifest.json", "complete"])
def test_verify_ends_with_1_for_a_damaged_checkpoint(
    name: str, harm: Callable[[Path], None], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found in the run and by its own directory; the checkpoint before it is whole."""
    directory = run / "checkpoints" / "step_00000004"
    (path,) = directory.glob(name)
    harm(path)
    for where in (run, directory):
        code, output, errors = shoestring(capsys, "checkpoint", "verify", where)
        assert (code, errors) == (1, "")
        assert str(directory) in output
    code, output, _ = shoestring(capsys, "checkpoint", "verify", run, "--format", "json")
    found = json.loads(output)
    assert code == 1
    assert found["path"] == str(directory)
    assert len(found["damage"]) >= 1
    assert (found["tensors"] is None) == (name in ("manifest.json", "complete"))
    assert shoestring(capsys, "checkpoint", "verify", run, "--step", "2")[0] == 0


def test_verify_names_every_damaged_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = run / "checkpoints" / "step_00000004"
    (part,) = directory.glob("part_*.safetensors")
    truncate(part)
    (directory / "tokenizer.json").unlink()
    code, output, _ = shoestring(capsys, "checkpoint", "verify", run)
    assert code == 1
    assert output.replace("\n", "").count(str(directory)) == 2
    assert "bytes instead of" in output
    assert "is missing" in output
    for path in directory.iterdir():
        path.unlink()
    code, output, _ = shoestring(capsys, "checkpoint", "verify", run)
    assert code == 1
    assert "complete: is missing" in output


def test_verify_ends_with_2_where_there_is_no_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "step_00000009").write_text("a file")
    for place in ("empty", "nowhere", "step_00000009", "run/checkpoints/step_00000004/complete"):
        code, _, errors = shoestring(capsys, "checkpoint", "verify", tmp_path / place)
        assert code == 2, place
        assert "holds no checkpoint" in errors


def test_diff_finds_what_differs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shoestring(capsys, "checkpoint", "diff", run, run)[0] == 0
    code, output, _ = shoestring(capsys, "checkpoint", "diff", run, run, "--other-step", "2", "--format", "json")
    assert code == 1
    found = json.loads(output)
    assert found["facts"] == ["step: 4 | 2"]
    (weights,) = found["tensors"]
    assert weights["kind"] == "model"
    assert 0 < weights["equal"] < weights["tensors"]  # norms are all 1
    assert weights["largest"] > 0.1
    shorter = SHAPE.__dict__ | {"num_hidden_layers": 1}
    save_model(Model(ModelConfig(**shorter)), run / "other", 1)
    code, output, _ = shoestring(capsys, "checkpoint", "diff", run, run / "other", "--format", "json")
    assert code == 1
    assert json.loads(output)["tensors"][0]["only_first"] > 0
    assert "config.model.num_hidden_layers: 2 | 1" in json.loads(output)["facts"]


def test_what_is_not_there_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = shoestring(capsys, "checkpoint", "verify", run, "--step", "3")
    assert code == 2
    assert "it has 2, 4" in errors
    for arguments in (["checkpoint", "ls"], ["checkpoint", "verify"], ["generate", "--prompt", "x"]):
        code, _, errors = shoestring(capsys, *arguments, run / "nowhere")
        assert code == 2
        assert "nowhere" in errors
    code, _, errors = shoestring(capsys, "export", run, run / "out", "--max-shard", "many")
    assert code == 2
    assert "--max-shard = 'many'" in errors


def test_export_and_import_carry_the_tokenizer(
    run: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output, _ = shoestring(capsys, "export", run, tmp_path / "hf", "--dtype", "fp32", "--max-shard", "100KB")
    assert code == 0
    assert f"exported {run / 'checkpoints' / 'step_00000004'}" in output
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs(TEXT[:200])["input_ids"] == tokenizer.encode(TEXT[:200])
    assert (theirs.eos_token, theirs.pad_token) == (END, PAD)
    loaded = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "hf")
    assert (loaded.config.eos_token_id, loaded.config.pad_token_id) == (tokenizer.end, tokenizer.pad)
    assert loaded.config.max_position_embeddings == 32  # what it was trained with
    code, output, _ = shoestring(capsys, "import", tmp_path / "hf", tmp_path / "again")
    assert code == 0
    code, output, _ = shoestring(capsys, "checkpoint", "diff", run, tmp_path / "again", "--format", "json")
    assert code == 0
    assert "config.model.name: 'tiny' | 'hf'" in json.loads(output)["facts"]
    code, _, errors = shoestring(capsys, "import", tmp_path / "hf", tmp_path / "again")
    assert code == 2
    assert "holds checkpoints already" in errors
    assert shoestring(capsys, "generate", tmp_path / "again", "--prompt", "word", "--tokens", "2")[0] == 0


def test_generate_prints_text_and_the_acceptance_of_drafts(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy: list[str | Path] = ["generate", run, "--prompt", "word1 word2", "--tokens", "12", "--temperature", "0"]
    code, drafted, counts = shoestring(capsys, *greedy)
    assert code == 0
    assert drafted.startswith("word1 word2")
    assert "acceptance rate" in counts
    code, plain, counts = shoestring(capsys, *greedy, "--no-draft")
    assert plain == drafted
    assert "nothing was drafted" in counts
    code, _, errors = shoestring(capsys, "generate", run, "--prompt", "", "--tokens", "0")
    assert code == 2
    assert "--prompt" in errors
    assert "--tokens" in errors
    save_model(model(1), tmp_path / "bare")
    code, _, errors = shoestring(capsys, "generate", tmp_path / "bare", "--prompt", "word")
    assert code == 2
    assert "has no tokenizer.json" in errors


def test_the_average_of_the_weights_is_exported_and_generates(
    run: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if it were the weights; routing biases are the model's own, for they are not averaged."""
    last, average = model(7), model(8)
    for _, router in last.routers():
        router.bias_E.uniform_(-1, 1)
    attachments = {"tokenizer.json": tokenizer.to_json().encode()}
    save_model(last, run / "checkpoints", 7, attachments, average)
    for (_, theirs), (_, own) in zip(average.routers(), last.routers(), strict=True):
        theirs.bias_E.copy_(own.bias_E)
    save_model(average, tmp_path / "alone", 7, attachments)
    assert shoestring(capsys, "export", run, tmp_path / "hf", "--dtype", "fp32", "--average")[0] == 0
    assert shoestring(capsys, "export", tmp_path / "alone", tmp_path / "expected", "--dtype", "fp32")[0] == 0
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (tmp_path / "expected/model.safetensors").read_bytes()
    greedy: list[str | Path] = ["--prompt", "word1", "--tokens", "12", "--temperature", "0"]
    text = shoestring(capsys, "generate", tmp_path / "alone", *greedy)[1]
    assert shoestring(capsys, "generate", run, *greedy, "--average")[1] == text
    assert shoestring(capsys, "generate", run, *greedy)[1] != text
    verbs: list[list[str | Path]] = [["export", run, tmp_path / "none"], ["generate", run, *greedy]]
    for verb in verbs:
        code, _, errors = shoestring(capsys, *verb, "--step", "4", "--average")
        assert code == 2
        assert "holds no average of the weights; a run keeps one with optimizer.ema_decay" in errors


def test_an_export_of_a_damaged_checkpoint_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (part,) = (run / "checkpoints" / "step_00000004").glob("part_*.safetensors")
    flip_bit(part)
    code, _, errors = shoestring(capsys, "export", run, tmp_path / "hf")
    assert code == 2
    assert "SHA-256" in errors
    assert shoestring(capsys, "export", run, tmp_path / "hf", "--step", "2")[0] == 0
