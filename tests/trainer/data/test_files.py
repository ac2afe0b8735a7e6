"""Files that are hashed as they are written."""

import hashlib
from contextlib import closing
from pathlib import Path

import pytest

from shoestring.trainer.data.files import HashedFileWriter, write_file_durably
from shoestring.trainer.data.manifest import FileEntry


def test_the_entry_is_that_of_what_was_written_and_no_file_is_written_twice(tmp_path: Path) -> None:
    with closing(HashedFileWriter(tmp_path / "parts")) as file:
        file.write(b"one ")
        file.write(b"two")
    whole = write_file_durably(tmp_path / "whole", b"one two")
    assert whole == FileEntry("whole", 7, hashlib.sha256(b"one two").hexdigest())
    assert (file.entry.bytes, file.entry.sha256) == (whole.bytes, whole.sha256)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    with pytest.raises(FileExistsError):
        HashedFileWriter(tmp_path / "whole")
