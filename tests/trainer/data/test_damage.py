"""A prepared directory that is not what was written is refused, and the message names the file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoestring.comm.errors import ConfigError
from shoestring.trainer.data import prepared
from shoestring.trainer.data.config import DataConfig
from shoestring.trainer.data.inspect import describe, render
from shoestring.trainer.data.manifest import FileEntry
from shoestring.trainer.data.prepare import prepare
from shoestring.trainer.data.prepared import open_directory, verify, verify_before_run
from shoestring.trainer.data.shards import verify_files
from shoestring.trainer.data.stamp import STAMP


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    (root / "corpus").mkdir()
    (root / "corpus" / "a.txt").write_text("The time has come, the walrus said, to talk of many things. " * 30)
    (root / "corpus" / "b.txt").write_text("Of shoes and ships and sealing-wax, of cabbages and kings. " * 5)
    config = DataConfig(corpus=str(root / "corpus"), prepared=str(root / "prepared"), vocabulary=290, validation=("b",))
    prepare(config, lambda line: None, shard_tokens=200)
    return root / "prepared"


@pytest.fixture
def directory(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "copy"))


def refusal(act: Callable[[Path], object], directory: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        act(directory)
    return str(caught.value)


def edit_manifest(directory: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = directory / "manifest.json"
    tree = json.loads(path.read_text())
    edit(tree)
    path.write_text(json.dumps(tree))


def test_what_was_written_verifies(directory: Path) -> None:
    assert verify(directory).manifest == open_directory(directory).manifest


def test_truncated_and_missing_shards_are_refused_together(directory: Path) -> None:
    shard = directory / "train_00001.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    (directory / "validation_00000.bin").unlink()
    for act in (open_directory, verify):
        message = refusal(act, directory)
        assert "train_00001.bin = 398: must have 400 bytes" in message
        assert "validation_00000.bin = None: is missing" in message


def test_a_changed_byte_is_found_by_verify(directory: Path) -> None:
    shard = directory / "train_00000.bin"
    raw = bytearray(shard.read_bytes())
    raw[100] ^= 1
    shard.write_bytes(raw)
    open_directory(directory)  # reads no token
    for act in (verify, describe, verify_for_launch):
        message = refusal(act, directory)
        assert message.count("train_00000.bin") == 1
        assert "the file is damaged; remove the directory and prepare again" in message


def verify_for_launch(directory: Path) -> None:
    verify_before_run(directory, open_directory(directory).manifest, first_machine=True)


def test_large_data_is_read_once_and_when_it_changes(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def count(folder: Path, files: Sequence[FileEntry]) -> None:
        read.extend(entry.file for entry in files)
        verify_files(folder, files)

    monkeypatch.setattr(prepared, "verify_files", count)
    monkeypatch.setattr(prepared, "CHEAP_BYTES", 0)
    manifest = open_directory(directory).manifest
    verify_before_run(directory, manifest, first_machine=False)
    assert read == []
    verify_for_launch(directory)
    assert read == [entry.file for entry in manifest.files]
    read.clear()
    verify_for_launch(directory)
    assert read == []
    shard = directory / "train_00000.bin"
    shard.write_bytes(bytes(reversed(shard.read_bytes())))
    os.utime(shard, ns=(0, 0))
    for _ in range(2):  # a refusal leaves no stamp
        assert "train_00000.bin" in refusal(verify_for_launch, directory)
        assert read.pop() == "train_00000.bin"
        assert read == []
    (directory / STAMP).write_text("[")
    assert "train_00000.bin" in refusal(verify_for_launch, directory)
    assert len(read) == len(manifest.files)


def test_another_tokenizer_is_refused(directory: Path) -> None:
    path = directory / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    assert "tokenizer.json" in (message := refusal(open_directory, directory))
    assert "is not the tokenizer of these shards" in message
    path.unlink()
    assert "tokenizer.json = None: is missing" in refusal(open_directory, directory)


@pytest.mark.parametrize("text", ["{}", "no json", '{"version": "1.0", "model": {"type": "WordLevel"}}'])
def test_a_file_that_is_no_tokenizer_of_ours_is_refused(directory: Path, text: str) -> None:
    (directory / "tokenizer.json").write_text(text)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    edit_manifest(directory, lambda tree: tree["tokenizer"].update(sha256=sha256))
    assert "is not a tokenizer of ours" in refusal(open_directory, directory)


def test_damaged_document_starts_are_refused(directory: Path) -> None:
    path = directory / "train_documents.npy"
    size = path.stat().st_size
    path.write_bytes(b"x" * size)
    assert "is not an .npy file" in refusal(open_directory, directory)
    np.save(path, np.array([5], dtype=np.int64))
    assert path.stat().st_size == size
    assert "rising document starts" in refusal(open_directory, directory)


@pytest.mark.parametrize(
    "edit",
    [
        lambda tree: tree.update(vocabulary=299),
        lambda tree: tree.update(extra=1),
        lambda tree: tree.pop("sources"),
        lambda tree: tree.update(dtype="uint32"),
        lambda tree: tree["train"].update(tokens="many"),
        lambda tree: tree["train"]["shards"][0].update(file="../train_00000.bin"),
    ],
)
def test_a_changed_manifest_is_refused(directory: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    edit_manifest(directory, edit)
    assert "manifest.json" in (message := refusal(open_directory, directory))
    assert "is damaged" in message


def test_a_manifest_that_disagrees_with_its_shards_is_refused(directory: Path) -> None:
    edit_manifest(directory, lambda tree: tree["train"].update(tokens=tree["train"]["tokens"] + 1))
    assert "need shards of" in refusal(open_directory, directory)


def test_manifests_cut_short_missing_or_of_another_format_are_refused(directory: Path) -> None:
    edit_manifest(directory, lambda tree: tree.update(format=99))
    assert "manifest.json = 99: this version reads format 1" in refusal(open_directory, directory)
    path = directory / "manifest.json"
    for text in ("", path.read_text()[:100], "[]", "null"):
        path.write_text(text)
        assert "is damaged" in refusal(open_directory, directory)
    path.unlink()
    assert "shoestring data prepare" in refusal(open_directory, directory)


def test_the_description_counts_what_is_there(directory: Path) -> None:
    description = describe(directory)
    train, validation = description.splits
    manifest = open_directory(directory).manifest
    assert (train.works, train.documents, train.tokens) == (("a",), 1, manifest.train.tokens)
    assert validation.bytes == len("Of shoes and ships and sealing-wax, of cabbages and kings. " * 5)
    assert 0 < validation.unigram_entropy < np.log(290)
    assert description.excerpt.startswith("The time has come, the walrus said")
    assert f"{manifest.train.tokens}" in render(description)


def test_a_token_beyond_the_vocabulary_is_refused(directory: Path) -> None:
    """Whoever wrote the shard has written hashes that fit."""
    shard = directory / "validation_00000.bin"
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    sha256 = hashlib.sha256(shard.read_bytes()).hexdigest()
    edit_manifest(directory, lambda tree: tree["validation"]["shards"][0].update(sha256=sha256))
    assert "data.prepared: validation = 65535: is a token of the split" in refusal(describe, directory)
