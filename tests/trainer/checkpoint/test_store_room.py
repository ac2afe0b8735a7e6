"""Disk space for checkpoints: checked before a save, freed from crash leftovers, or reported missing."""

import errno
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from shoestring.tests.trainer.checkpoint.small_store import WORLD, names, pieces, save, tensors
from shoestring.trainer.checkpoint import saver as saving
from shoestring.trainer.checkpoint.saver import CheckpointSaver
from shoestring.trainer.checkpoint.store import CheckpointExtras, CheckpointStore

MB = 2**20


def with_free(free: int) -> AbstractContextManager[object]:
    """Make the disk report `free` bytes."""
    usage = SimpleNamespace(free=free)
    return patch("shoestring.trainer.checkpoint.store.shutil.disk_usage", lambda path: usage)


def test_a_save_without_room_ends_before_it_begins(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    save(store, 1)
    with with_free(MB):
        saved = save(store, 2)
    assert saved is not None
    assert "a checkpoint takes" in str(saved.failure)
    assert "1,048,576 are free" in str(saved.failure)
    assert names(tmp_path) == ["step_00000001"]


def test_the_oldest_goes_first_where_that_makes_room(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in (1, 2):
        save(store, step)
    with with_free(MB - 100):  # with the kilobytes of a checkpoint it is enough
        saved = save(store, 3)
    assert saved is not None
    assert saved.failure is None
    assert saved.warning is not None
    assert "that of step 1 was removed before the checkpoint of step 3 was written" in saved.warning
    assert store.steps() == [2, 3]


def test_nothing_goes_where_it_would_not_help_and_the_newest_never(tmp_path: Path) -> None:
    for keep in (1, 2):
        store = CheckpointStore(tmp_path / str(keep), keep_last=keep)
        for step in range(1, keep + 1):
            save(store, step)
        with with_free(0 if keep == 2 else MB - 100):
            assert (saved := save(store, 9)) is not None
            assert saved.failure is not None
        assert store.steps() == [*range(1, keep + 1)]


def test_nothing_goes_while_the_newest_is_damaged(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in (1, 2):
        save(store, step)
    (store.checkpoint_path(2) / "manifest.json").unlink()
    with with_free(MB - 100):
        assert (saved := save(store, 3)) is not None
        assert saved.failure is not None
    assert store.steps() == [1, 2]


def test_what_crashes_have_left_is_cleared(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    save(store, 1)
    for leftover in ("step_00000002.partial", "step_00000001.old"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "part_00000.safetensors").write_bytes(b"x")
    (tmp_path / "step_00000003.damaged").mkdir()
    store.remove_partial_saves()
    assert names(tmp_path) == ["step_00000001", "step_00000003.damaged"]
    CheckpointStore(tmp_path / "none", keep_last=1).remove_partial_saves()


def test_a_run_directory_that_is_gone_is_not_created(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep_last=2)
    saver = CheckpointSaver(store, WORLD)
    saver.begin_save(1, pieces(tensors()), CheckpointExtras())
    assert (saved := saver.finish_save()) is not None
    assert "No such file or directory" in str(saved.failure)
    assert not (tmp_path / "run").exists()
    saver.close()


@pytest.mark.parametrize(("number", "is_hopeless"), [(errno.EFBIG, True), (errno.EIO, True), (errno.ENOSPC, False)])
def test_saves_that_fail_in_a_row_are_counted(tmp_path: Path, number: int, is_hopeless: bool) -> None:
    """A full disk gets some seconds."""
    saver = CheckpointSaver(CheckpointStore(tmp_path, keep_last=2), WORLD)
    with patch.object(saving, "write_rank_file", side_effect=OSError(number, "no")):
        for step in (1, 2, 3):
            assert not saver.has_failed_repeatedly(3)
            saver.begin_save(step, pieces(tensors()), CheckpointExtras())
            saver.finish_save()
        assert saver.has_failed_repeatedly(3) == is_hopeless
        with patch.object(saving, "FULL_DISK_GRACE_SECONDS", 0.0):
            saver.begin_save(4, pieces(tensors()), CheckpointExtras())
            saver.finish_save()
        assert saver.has_failed_repeatedly(4)
    saver.begin_save(5, pieces(tensors()), CheckpointExtras())
    saver.finish_save()
    assert not saver.has_failed_repeatedly(1)
    saver.close()


def test_what_a_checkpoint_takes_is_separate_from_what_is_kept_free(tmp_path: Path) -> None:
    words = "takes 6,400 bytes, 1,048,676 more are kept free, and 1,000 are free"
    with with_free(1000), pytest.raises(OSError, match=words):
        CheckpointStore(tmp_path, keep_last=2).prepare_save(1, 6400)
