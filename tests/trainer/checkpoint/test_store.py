"""Checkpoints: their guarantees, and what a crash may leave behind."""

from pathlib import Path

import pytest
import torch

from shoestring.tests.trainer.checkpoint.small_store import names, pieces, save, tensors
from shoestring.trainer.checkpoint.saver import SaveResult
from shoestring.trainer.checkpoint.store import CheckpointStore


def test_what_was_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=2)
    state = {name: torch.randn_like(tensor) for name, tensor in tensors().items()}
    assert save(store, 7, state) == SaveResult(7, store.checkpoint_path(7), None)
    checkpoint = store.open(7)
    assert checkpoint.manifest.metadata == {"step": 7}
    assert checkpoint.read_attachment("note.txt") == b"words"
    assert list(checkpoint.find_damage()) == []
    loaded = tensors(0.0)
    for piece in pieces(loaded):
        checkpoint.fill_piece(piece)
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor)
        assert torch.equal(checkpoint.read_tensor(name), tensor)


def test_only_whole_checkpoints_count_and_the_oldest_go(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    assert store.steps() == []
    (tmp_path / "step_00000009.partial").mkdir(parents=True)  # a crash during step 9's
    (tmp_path / "step_00000008.old").mkdir()  # and during a removal
    (tmp_path / "thesis.partial").mkdir()  # not ours
    for step in (1, 2, 3):
        save(store, step)
    assert names(tmp_path) == ["step_00000002", "step_00000003", "thesis.partial"]
    save(store, 3, tensors(2.0))  # of an attempt that resumed from step 2
    assert torch.equal(store.open(3).read_tensor("a"), tensors(2.0)["a"])
    assert store.steps() == [2, 3]


def crash_at(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"shoestring.trainer.checkpoint.{target}", crash)


@pytest.mark.parametrize(
    "target",
    [
        "saver.write_rank_file",
        "saver.TensorFileWriter.write_tensor",
        "saver.write_file_durably",
        "store.merge_rank_records",
        "store.write_file_durably",
    ],
)
def test_a_save_that_dies_half_way_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    save(store, 1)
    with monkeypatch.context() as patched:
        crash_at(patched, target)
        with pytest.raises(KeyboardInterrupt):
            save(store, 2, tensors(0.0))
    assert store.steps() == [1]
    assert torch.equal(store.open(1).read_tensor("a"), tensors()["a"])
    save(store, 3)
    assert store.steps() == [1, 3]
    assert names(tmp_path) == ["step_00000001", "step_00000003"]


def test_a_crash_while_old_checkpoints_go_leaves_no_half_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    save(store, 1)

    def crash(path: Path) -> None:
        (path / "manifest.json").unlink()  # a partial removal
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shoestring.trainer.checkpoint.store.shutil.rmtree", crash)
        save(store, 2)
    assert names(tmp_path) == ["step_00000001.old", "step_00000002"]
    assert store.steps() == [2]
    save(store, 3)
    assert names(tmp_path) == ["step_00000003"]
