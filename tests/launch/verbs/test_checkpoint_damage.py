"""Checkpoints whose headers or manifests are damaged: verified, and opened."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from shoestring.tests.launch.command_line import shoestring
from shoestring.tests.launch.small_checkpoint import part, reseal


@pytest.mark.parametrize("place", [0, 3, 9, 12, 40, 200, 2000])
def test_verify_finds_a_damaged_header(place: int, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = bytearray(part(run).read_bytes())
    raw[place] ^= 1
    part(run).write_bytes(raw)
    code, output, errors = shoestring(capsys, "checkpoint", "verify", run)
    assert (code, errors) == (1, "")
    assert f"{part(run)}: its header is damaged" in output


def test_verify_reads_every_bit_of_a_header(run: Path) -> None:
    """The damage is found even where the safetensors library opens the file without an error."""
    from shoestring.trainer.checkpoint.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(part(run).parent)
    assert list(checkpoint.find_damage()) == []
    whole = part(run).read_bytes()
    opened = 0
    for place in range(8, 8 + int.from_bytes(whole[:8], "little"), 97):
        raw = bytearray(whole)
        raw[place] ^= 1 << place % 8
        part(run).write_bytes(raw)
        assert any("header is damaged" in line for line in checkpoint.find_damage()), place
        try:
            with safe_open(part(run), "pt"):
                opened += 1
        except (SafetensorError, RuntimeError, UnicodeDecodeError):
            pass
    assert opened > 0


def test_verify_does_not_send_to_itself(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (part(run).parent / "manifest.json").write_text("{}")
    code, output, _ = shoestring(capsys, "checkpoint", "verify", run)
    assert code == 1
    assert "its SHA-256 is not that in complete" in output
    assert "checkpoint verify`" not in output


def first_piece(tree: dict[str, Any]) -> list[Any]:
    piece: list[Any] = next(iter(tree["tensors"].values()))[2][0]
    return piece


@pytest.mark.parametrize(
    "edit",
    [
        lambda tree: tree["files"].update({"/etc/passwd": 10}),
        lambda tree: tree["files"].update({"../x": 10}),
        lambda tree: tree["files"].update({"": 10}),
        lambda tree: tree["files"].update(dict.fromkeys(tree["files"], "10")),
        lambda tree: tree["attachments"][0].update(file="/dev/zero", bytes=0),
        lambda tree: tree["attachments"][0].update(file="manifest.json"),
        lambda tree: tree["attachments"][0].update(sha256=None),
        lambda tree: tree["attachments"].append(tree["attachments"][0]),
        lambda tree: tree.update(attachments={}),
        lambda tree: tree.update(tensors=[]),
        lambda tree: tree.update(extra=1),
        lambda tree: tree.pop("metadata"),
        lambda tree: first_piece(tree).__setitem__(0, "/etc/passwd"),
        lambda tree: first_piece(tree).__setitem__(1, -8),
        lambda tree: first_piece(tree).__setitem__(1, 10**15),
        lambda tree: first_piece(tree).__setitem__(1, 0.5),
        lambda tree: first_piece(tree).__setitem__(2, 1),
        lambda tree: first_piece(tree).__setitem__(3, True),
        lambda tree: first_piece(tree).__setitem__(3, 10**18),
        lambda tree: first_piece(tree).append(1),
        lambda tree: next(iter(tree["tensors"].values())).__setitem__(0, "F4"),
        lambda tree: next(iter(tree["tensors"].values())).__setitem__(1, [10**9, 10**9]),
        lambda tree: next(iter(tree["tensors"].values())).__setitem__(2, []),
    ],
)
def test_a_resealed_manifest_is_damaged_and_no_other_file_is_opened(
    edit: Callable[[dict[str, Any]], object], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reseal(part(run).parent, edit)
    code, output, _ = shoestring(capsys, "checkpoint", "verify", run)
    assert code == 1
    assert "manifest.json" in output
    for verb in (["export", run, run / "out"], ["generate", run, "--prompt", "word"]):
        code, _, errors = shoestring(capsys, *verb)
        assert code == 2
        assert "manifest.json" in errors
        assert "is damaged" in errors
    code, output, _ = shoestring(capsys, "checkpoint", "ls", run, "--format", "json")
    assert code == 0
    assert json.loads(output)[0]["state"] == "damaged"


@pytest.mark.parametrize(
    "edit",
    [
        lambda tree: tree["metadata"].pop("config"),
        lambda tree: tree["metadata"].update(config=5),
        lambda tree: tree["metadata"]["config"].update(model=[]),
        lambda tree: tree["metadata"]["config"]["model"].update(hidden="16"),
        lambda tree: tree["metadata"]["config"]["model"].update(hidden=-1),
        lambda tree: tree["metadata"]["config"]["model"].update(color=1),
        lambda tree: tree["metadata"]["config"]["training"].update(sequence_length="long"),
    ],
)
def test_resealed_metadata_are_refused_where_they_are_needed(
    edit: Callable[[dict[str, Any]], object], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reseal(part(run).parent, edit)
    for verb in (["export", run, run / "out"], ["generate", run, "--prompt", "word"]):
        code, _, errors = shoestring(capsys, *verb)
        assert code == 2, errors
        assert "manifest.json" in errors
    assert not (run / "out").exists()
    assert shoestring(capsys, "checkpoint", "ls", run)[0] == 0
