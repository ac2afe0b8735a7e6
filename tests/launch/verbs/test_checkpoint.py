"""`shoestring checkpoint` as a user runs it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from shoestring.launch.cli import parse_arguments
from shoestring.launch.verbs.checkpoint import diff_answer, list_answer, verify_answer
from shoestring.tests.launch.command_line import shoestring
from shoestring.tests.launch.renderings import check_renderings
from shoestring.tests.launch.small_checkpoint import SHAPE, fifo, flip_bit, folder, model
from shoestring.tests.trainer.checkpoint.saved import save_model
from shoestring.trainer.checkpoint.store import CheckpointStore
from shoestring.trainer.model.config import ModelConfig
from shoestring.trainer.model.model import Model


def test_ls_distinguishes_whole_damaged_and_unfinished(saves: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = CheckpointStore(saves / "checkpoints", keep_last=9)
    (store.checkpoint_path(4) / "complete").unlink()
    with patch("shoestring.trainer.checkpoint.manifest.FORMAT_VERSION", 5):
        save_model(model(5), saves / "checkpoints", 5)
    store.partial_path(6).mkdir()  # now, because the next save clears it
    code, output, _ = shoestring(capsys, "checkpoint", "ls", saves, "--format", "json")
    assert code == 0
    listed = json.loads(output)
    states = {each["name"]: each["state"] for each in listed}
    assert states == {
        "step_00000002": "complete",
        "step_00000004": "damaged",
        "step_00000005": "refused",
        "step_00000006.partial": "unfinished",
    }
    reasons = {each["name"]: each["reason"] for each in listed}
    assert "reads checkpoint format 4; use the version that wrote it" in reasons["step_00000005"]
    assert [name for name, reason in reasons.items() if not reason] == ["step_00000002"]
    shown = shoestring(capsys, "checkpoint", "ls", saves)[1].splitlines()
    assert any("step_00000002" in line and "complete" in line for line in shown)
    assert f"step_00000005: {reasons['step_00000005']}" in shown  # on one line


def test_verify_reads_every_byte(saves: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, _ = shoestring(capsys, "checkpoint", "verify", saves)
    assert code == 0
    assert "step_00000004" in output
    assert "all hashes and headers are correct" in output
    (part,) = (saves / "checkpoints" / "step_00000004").glob("part_*.safetensors")
    flip_bit(part)
    code, output, _ = shoestring(capsys, "checkpoint", "verify", saves)
    assert code == 1
    assert str(part) in output
    assert shoestring(capsys, "checkpoint", "verify", saves, "--step", "2")[0] == 0


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
    name: str, harm: Callable[[Path], None], saves: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The damage is found through the run and through the checkpoint's directory; the one before it is whole."""
    directory = saves / "checkpoints" / "step_00000004"
    (path,) = directory.glob(name)
    harm(path)
    for where in (saves, directory):
        code, output, errors = shoestring(capsys, "checkpoint", "verify", where)
        assert (code, errors) == (1, "")
        assert str(directory) in output
    code, output, _ = shoestring(capsys, "checkpoint", "verify", saves, "--format", "json")
    found = json.loads(output)
    assert code == 1
    assert found["path"] == str(directory)
    assert len(found["damage"]) >= 1
    assert (found["tensors"] is None) == (name in ("manifest.json", "complete"))
    assert shoestring(capsys, "checkpoint", "verify", saves, "--step", "2")[0] == 0


def test_verify_names_every_damaged_file(saves: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = saves / "checkpoints" / "step_00000004"
    (part,) = directory.glob("part_*.safetensors")
    truncate(part)
    (directory / "tokenizer.json").unlink()
    code, output, _ = shoestring(capsys, "checkpoint", "verify", saves)
    assert code == 1
    assert output.replace("\n", "").count(str(directory)) == 2
    assert "bytes instead of" in output
    assert "is missing" in output
    for path in directory.iterdir():
        path.unlink()
    code, output, _ = shoestring(capsys, "checkpoint", "verify", saves)
    assert code == 1
    assert "complete: is missing" in output


def test_verify_ends_with_2_where_there_is_no_checkpoint(
    saves: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "step_00000009").write_text("a file")
    for place in ("empty", "nowhere", "step_00000009", "run/checkpoints/step_00000004/complete"):
        code, _, errors = shoestring(capsys, "checkpoint", "verify", tmp_path / place)
        assert code == 2, place
        assert "holds no checkpoint" in errors


def test_diff_finds_what_differs(saves: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shoestring(capsys, "checkpoint", "diff", saves, saves)[0] == 0
    code, output, _ = shoestring(capsys, "checkpoint", "diff", saves, saves, "--other-step", "2", "--format", "json")
    assert code == 1
    found = json.loads(output)
    assert found["metadata"] == ["step: 4 | 2"]
    (weights,) = found["tensors"]
    assert weights["kind"] == "model"
    assert 0 < weights["equal"] < weights["tensors"]  # norms are all 1
    assert weights["largest"] > 0.1
    shorter = SHAPE.__dict__ | {"num_hidden_layers": 1}
    save_model(Model(ModelConfig(**shorter)), saves / "other", 1)
    code, output, _ = shoestring(capsys, "checkpoint", "diff", saves, saves / "other", "--format", "json")
    assert code == 1
    assert json.loads(output)["tensors"][0]["only_first"] > 0
    assert "config.model.num_hidden_layers: 2 | 1" in json.loads(output)["metadata"]


def test_three_renderings_show_the_same_numbers(saves: Path) -> None:
    for arguments, quantities in (
        (("ls", saves), 4),
        (("verify", saves), 0),
        (("diff", saves, saves, "--other-step", "2"), 6),
    ):
        options = parse_arguments(["checkpoint", *map(str, arguments)])
        find = {"ls": list_answer, "verify": verify_answer, "diff": diff_answer}[options.action]
        check_renderings(find(options), smallest_number_of_quantities=quantities)


def test_what_is_not_there_is_refused(saves: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = shoestring(capsys, "checkpoint", "verify", saves, "--step", "3")
    assert code == 2
    assert "it has 2, 4" in errors
    for arguments in (["checkpoint", "ls"], ["checkpoint", "verify"], ["generate", "--prompt", "x"]):
        code, _, errors = shoestring(capsys, *arguments, saves / "nowhere")
        assert code == 2
        assert "nowhere" in errors
    code, _, errors = shoestring(capsys, "export", saves, saves / "out", "--max-shard", "many")
    assert code == 2
    assert "--max-shard = 'many'" in errors
