"""Large files are read once, and again after a change."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from shoestring.tests.trainer.data.small_data import refusal, shard, verify_for_launch
from shoestring.trainer.data import prepared
from shoestring.trainer.data.manifest import FileEntry
from shoestring.trainer.data.prepared import all_files, open_prepared_directory, verify_before_run
from shoestring.trainer.data.shards import verify_file_hashes
from shoestring.trainer.data.verified_files import VERIFIED_FILE


def test_large_data_is_read_once_and_when_it_changes(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def count(folder: Path, files: Sequence[FileEntry]) -> None:
        read.extend(entry.file for entry in files)
        verify_file_hashes(folder, files)

    monkeypatch.setattr(prepared, "verify_file_hashes", count)
    monkeypatch.setattr(prepared, "ALWAYS_VERIFY_BYTES", 0)
    data = open_prepared_directory(directory)
    files = [entry.file for entry in all_files(data.manifest, data.parts)]
    verify_before_run(directory, data, first_machine=False)
    assert read == []
    verify_for_launch(directory)
    assert read == files
    read.clear()
    verify_for_launch(directory)
    assert read == []
    path = shard(directory, "train")
    path.write_bytes(bytes(reversed(path.read_bytes())))
    os.utime(path, ns=(0, 0))
    for _ in range(2):  # a refusal leaves no stamp
        assert path.name in refusal(verify_for_launch, directory)
        assert read.pop() == path.name
        assert read == []
    (directory / VERIFIED_FILE).write_text("[")
    assert path.name in refusal(verify_for_launch, directory)
    assert len(read) == len(files)
