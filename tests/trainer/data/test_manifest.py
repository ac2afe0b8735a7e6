"""A changed manifest is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoestring.tests.trainer.data.small_data import edit_manifest, refusal
from shoestring.trainer.data.prepared import open_prepared_directory


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
    assert "manifest.json" in (message := refusal(open_prepared_directory, directory))
    assert "is damaged" in message


def test_a_manifest_that_disagrees_with_its_shards_is_refused(directory: Path) -> None:
    edit_manifest(directory, lambda tree: tree["train"].update(tokens=tree["train"]["tokens"] + 1))
    assert "need shards of" in refusal(open_prepared_directory, directory)


def test_manifests_cut_short_missing_or_of_another_format_are_refused(directory: Path) -> None:
    edit_manifest(directory, lambda tree: tree.update(format=99))
    assert "manifest.json = 99: this version reads format 1" in refusal(open_prepared_directory, directory)
    path = directory / "manifest.json"
    for text in ("", path.read_text()[:100], "[]", "null"):
        path.write_text(text)
        assert "is damaged" in refusal(open_prepared_directory, directory)
    path.unlink()
    assert "shoestring data prepare" in refusal(open_prepared_directory, directory)
