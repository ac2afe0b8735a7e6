"""The checkpoint that a path means."""

import errno
from pathlib import Path

import pytest

from shoestring.comm.errors import ConfigError
from shoestring.tests.trainer.checkpoint.small_store import save
from shoestring.trainer.checkpoint.find import find_checkpoint
from shoestring.trainer.checkpoint.store import CheckpointStore


def test_a_checkpoint_that_cannot_be_read_now_is_refused_and_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(CheckpointStore(tmp_path, keep_last=1), 1)

    def fail(path: Path, most: int) -> str:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("shoestring.trainer.checkpoint.manifest.read_text", fail)
    with pytest.raises(ConfigError, match=r"Input/output error.*cannot be read now; nothing was changed"):
        find_checkpoint(tmp_path)
