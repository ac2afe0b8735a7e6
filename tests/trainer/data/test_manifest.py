"""A changed manifest or list of parts is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoestring.tests.trainer.data.small_data import edit_manifest, edit_parts, refusal
from shoestring.trainer.data.manifest import PreparationSettings
from shoestring.trainer.data.prepared import open_prepared_directory


@pytest.mark.parametrize(
    "edit",
    [
        lambda tree: tree.update(extra=1),
        lambda tree: tree.pop("parts"),
        lambda tree: tree["settings"].update(vocab_size=0),
        lambda tree: tree["train"].update(tokens="many"),
        lambda tree: tree["train"].update(documents=0),
        lambda tree: tree["tokenizer"].update(file="../tokenizer.json"),
        lambda tree: tree["parts"].update(file="manifest.json"),
    ],
)
def test_a_changed_manifest_is_refused(directory: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    edit_manifest(directory, edit)
    assert "manifest.json" in (message := refusal(open_prepared_directory, directory))
    assert "is damaged" in message


@pytest.mark.parametrize(
    ("edit", "gist"),
    [
        (lambda parts: parts[0]["train"].update(tokens=parts[0]["train"]["tokens"] + 1), "need"),
        (lambda parts: parts[0]["train"]["shards"][0].update(file="../x"), "must name a file inside the folder"),
        (lambda parts: parts[0]["train"]["starts"].update(bytes=7), "8 bytes each"),
        (lambda parts: parts.pop(), "do not add up"),
        (lambda parts: parts.append(parts[0]), "do not add up"),
        (lambda parts: parts[1].update(validation=None), "do not add up"),
        (lambda parts: parts[0]["train"].update(tokens=10**15), "need"),
    ],
)
def test_a_changed_list_of_parts_is_refused(
    directory: Path, edit: Callable[[list[dict[str, Any]]], object], gist: str
) -> None:
    edit_parts(directory, edit)
    assert "parts-" in (message := refusal(open_prepared_directory, directory))
    assert gist in message


def test_two_files_of_one_name_are_refused(directory: Path) -> None:
    edit_parts(directory, lambda parts: parts[0]["train"]["starts"].update(file="tokenizer.json"))
    assert "must have different names" in refusal(open_prepared_directory, directory)


def test_a_list_of_parts_with_another_hash_is_refused(directory: Path) -> None:
    (path,) = directory.glob("parts-*.jsonl")
    path.write_bytes(path.read_bytes().replace(b"0", b"1"))
    assert "must have SHA-256" in refusal(open_prepared_directory, directory)


def test_manifests_cut_short_missing_or_of_another_format_are_refused(directory: Path) -> None:
    edit_manifest(directory, lambda tree: tree.update(format=1))
    assert "manifest.json = 1: this version reads format 2" in refusal(open_prepared_directory, directory)
    path = directory / "manifest.json"
    for text in ("", path.read_text()[:100], "[]", "null"):
        path.write_text(text)
        assert "is damaged" in refusal(open_prepared_directory, directory)
    path.unlink()
    assert "shoestring data prepare" in refusal(open_prepared_directory, directory)


def test_large_vocabularies_get_wide_shards(directory: Path) -> None:
    settings = open_prepared_directory(directory).manifest.settings

    def dtype(vocab_size: int) -> str:
        return PreparationSettings(**(vars(settings) | {"vocab_size": vocab_size})).dtype

    assert [dtype(size) for size in (258, 2**16, 2**16 + 1)] == ["uint16", "uint16", "uint32"]
