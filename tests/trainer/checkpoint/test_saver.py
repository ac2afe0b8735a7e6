"""A background save: the step's wait, the memory of its copies, and its failures."""

import errno
import mmap
import os
import resource
import shutil
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from shoestring.tests.comm.pages import StandInPages
from shoestring.tests.trainer.checkpoint.small_store import WORLD, names, pieces, save, tensors
from shoestring.trainer.checkpoint.saver import CheckpointSaver, SaveResult
from shoestring.trainer.checkpoint.store import CheckpointExtras, CheckpointStore


def test_the_step_waits_for_the_copy_alone(tmp_path: Path) -> None:
    """Changes after `begin_save` are not in the checkpoint."""
    store, saver = (
        CheckpointStore(tmp_path, keep_last=2),
        CheckpointSaver(CheckpointStore(tmp_path, keep_last=2), WORLD),
    )
    state = tensors()
    saver.begin_save(1, pieces(state), CheckpointExtras())
    for tensor in state.values():
        tensor.zero_()
    assert saver.finish_save() == SaveResult(1, store.checkpoint_path(1), None)
    saver.close()
    assert torch.equal(store.open(1).read_tensor("a"), tensors()["a"])


def test_the_memory_for_copies_is_allocated_in_the_background(tmp_path: Path) -> None:
    """The saver's thread allocates it once; an early save waits for it."""
    saver = CheckpointSaver(CheckpointStore(tmp_path, keep_last=1), WORLD)
    large, real = {"large": torch.arange(100_000.0)}, torch.empty
    may_go_on, made = threading.Event(), list[str]()

    def empty(*arguments: Any, **options: Any) -> Tensor:
        assert may_go_on.wait(10)
        made.append(threading.current_thread().name)
        return real(*arguments, **options)

    with patch("shoestring.comm.host_transfer.torch.empty", empty):
        saver.reserve_memory(pieces(large))
        threading.Timer(0.1, may_go_on.set).start()
        saver.begin_save(1, pieces(large), CheckpointExtras())
        assert saver.finish_save() == SaveResult(1, tmp_path / "step_00000001", None)
    saver.close()
    assert [name.split("_")[0] for name in made] == ["checkpoint"]
    assert torch.equal(CheckpointStore(tmp_path, keep_last=1).open(1).read_tensor("large"), large["large"])


def test_the_memory_for_copies_is_there_and_not_only_promised(tmp_path: Path) -> None:
    """The kernel maps pages when they are written."""
    saver, given, real = CheckpointSaver(CheckpointStore(tmp_path, keep_last=1), WORLD), list[Tensor](), torch.empty

    def empty(*arguments: Any, **options: Any) -> Tensor:
        given.append(real(*arguments, **options).fill_(7))
        return given[-1]

    with patch("shoestring.comm.host_transfer.torch.empty", empty):
        saver.reserve_memory(pieces({"large": torch.zeros(1000)}))
        saver.close()
    (buffer,) = given
    assert len(buffer) >= 4000
    assert not buffer.any()


def test_for_a_gpu_the_memory_for_copies_is_pinned_at_its_size(tmp_path: Path) -> None:
    """The pages are pinned before `reserve_memory` returns, because that stops a GPU, and until the saver ends."""
    pages = StandInPages()
    saver = CheckpointSaver(CheckpointStore(tmp_path, keep_last=1), WORLD)
    large = {"large": torch.arange(100_000.0)}
    where = "shoestring.trainer.checkpoint.saver"
    with (
        patch(f"{where}._any_on_gpu", return_value=True),
        patch(f"{where}.torch.cuda.synchronize") as copied,
        patch("torch.cuda.cudart", return_value=pages),
    ):
        saver.reserve_memory(pieces(large))
        assert list(pages.pinned.values()) == [-(-400_000 // mmap.PAGESIZE) * mmap.PAGESIZE]
        saver.begin_save(1, pieces(large), CheckpointExtras())
        copied.assert_called_once()
        assert saver.finish_save() == SaveResult(1, tmp_path / "step_00000001", None)
        saver.close()
    assert pages.log == ["pin", "unpin"]
    assert torch.equal(CheckpointStore(tmp_path, keep_last=1).open(1).read_tensor("large"), large["large"])


def test_poll_reports_once_when_a_save_has_ended(tmp_path: Path) -> None:
    saver = CheckpointSaver(CheckpointStore(tmp_path, keep_last=2), WORLD)
    assert saver.poll_save(*saver.save_votes()) is None
    saver.begin_save(1, pieces(tensors()), CheckpointExtras())
    while (saved := saver.poll_save(*saver.save_votes())) is None:
        os.sched_yield()
    assert saved == SaveResult(1, tmp_path / "step_00000001", None)
    assert (saver.poll_save(*saver.save_votes()), saver.finish_save()) == (None, None)
    saver.close()


def test_a_save_waits_until_the_oldest_checkpoint_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both look at what removals have left; a removal of many files takes a while."""
    store, may_go_on, real = CheckpointStore(tmp_path, keep_last=1), threading.Event(), shutil.rmtree
    saver = CheckpointSaver(store, WORLD)

    def slow(path: Path) -> None:
        assert may_go_on.wait(10)
        real(path)

    monkeypatch.setattr("shoestring.trainer.checkpoint.store.shutil.rmtree", slow)
    for step in (1, 2):
        saver.begin_save(step, pieces(tensors()), CheckpointExtras({"step": step}))
        assert saver.finish_save() == SaveResult(step, store.checkpoint_path(step), None)
    assert "step_00000002" in names(tmp_path)
    threading.Timer(0.1, may_go_on.set).start()
    saver.begin_save(3, pieces(tensors()), CheckpointExtras({"step": 3}))
    assert saver.finish_save() == SaveResult(3, store.checkpoint_path(3), None)
    saver.close()
    assert names(tmp_path) == ["step_00000003"]


def test_a_disk_that_is_full_ends_the_save_and_frees_its_place(tmp_path: Path) -> None:
    store, saver = (
        CheckpointStore(tmp_path, keep_last=2),
        CheckpointSaver(CheckpointStore(tmp_path, keep_last=2), WORLD),
    )
    save(store, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # the kernel refuses bytes beyond
    try:
        saver.begin_save(2, pieces({"large": torch.zeros(10_000)}), CheckpointExtras())
        saved = saver.finish_save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved is not None
    assert saved.failure == f"rank 0: [Errno {errno.EFBIG}] File too large"
    assert names(tmp_path) == ["step_00000001"]
    with patch("shoestring.trainer.checkpoint.store.Path.mkdir", side_effect=OSError(errno.ENOSPC, "No space left")):
        saver.begin_save(3, pieces(tensors()), CheckpointExtras())
        assert (saved := saver.finish_save()) is not None
        assert "No space left" in str(saved.failure)
    saver.begin_save(4, pieces(tensors()), CheckpointExtras())
    assert saver.finish_save() == SaveResult(4, store.checkpoint_path(4), None)
    saver.close()
