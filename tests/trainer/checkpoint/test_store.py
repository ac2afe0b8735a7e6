"""Checkpoints: what is promised, and what a crash may leave behind."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import shutil
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from shoestring.comm.errors import ConfigError
from shoestring.comm.groups import Group, ProcessGroups
from shoestring.comm.host import HostMemory
from shoestring.comm.topology import Topology
from shoestring.tests.comm.pages import StandInPages
from shoestring.tests.launch.refusals import refused
from shoestring.tests.processes import World, run_processes
from shoestring.trainer.checkpoint.find import find_checkpoint
from shoestring.trainer.checkpoint.manifest import Damaged
from shoestring.trainer.checkpoint.pieces import (
    EXP_AVG,
    MODEL,
    Piece,
    StateSlice,
    part_pieces,
    whole_pieces,
    written_by,
)
from shoestring.trainer.checkpoint.saver import Saved, Saver
from shoestring.trainer.checkpoint.store import CheckpointExtras, CheckpointStore

WORLD = Group((0,), None, 0, timedelta(seconds=1))


def tensors(value: float = 1.0) -> dict[str, Tensor]:
    return {
        "a": torch.full((3, 5), value),
        "b": torch.full((7,), value, dtype=torch.bfloat16),
        "c": torch.tensor(value),
    }


def pieces(state: dict[str, Tensor]) -> list[Piece]:
    return [piece for name, tensor in state.items() for piece in whole_pieces(name, tensor, (0,))]


def save(store: CheckpointStore, step: int, state: dict[str, Tensor] | None = None) -> Saved | None:
    saver = Saver(store, WORLD)
    saver.begin(
        step, pieces(tensors() if state is None else state), CheckpointExtras({"step": step}, {"note.txt": b"words"})
    )
    saved = saver.finish()
    saver.close()
    return saved


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_was_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    state = {name: torch.randn_like(tensor) for name, tensor in tensors().items()}
    assert save(store, 7, state) == Saved(7, store.path(7), None)
    checkpoint = store.open(7)
    assert checkpoint.manifest.facts == {"step": 7}
    assert checkpoint.attachment("note.txt") == b"words"
    assert list(checkpoint.damage()) == []
    loaded = tensors(0.0)
    for piece in pieces(loaded):
        checkpoint.fill(piece)
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor)
        assert torch.equal(checkpoint.read(name), tensor)


def test_the_step_waits_for_the_copy_alone(tmp_path: Path) -> None:
    """What the training changes after `begin` is not in the checkpoint."""
    store, saver = CheckpointStore(tmp_path, keep=2), Saver(CheckpointStore(tmp_path, keep=2), WORLD)
    state = tensors()
    saver.begin(1, pieces(state), CheckpointExtras())
    for tensor in state.values():
        tensor.zero_()
    assert saver.finish() == Saved(1, store.path(1), None)
    saver.close()
    assert torch.equal(store.open(1).read("a"), tensors()["a"])


def test_the_memory_for_copies_is_had_beside_the_training(tmp_path: Path) -> None:
    """Once, by the saver's thread; a save that comes too early waits for it."""
    saver = Saver(CheckpointStore(tmp_path, keep=1), WORLD)
    large, real = {"large": torch.arange(100_000.0)}, torch.empty
    may_go_on, made = threading.Event(), list[str]()

    def empty(*arguments: Any, **options: Any) -> Tensor:
        assert may_go_on.wait(10)
        made.append(threading.current_thread().name)
        return real(*arguments, **options)

    with patch("shoestring.comm.host.torch.empty", empty):
        saver.reserve(pieces(large))
        threading.Timer(0.1, may_go_on.set).start()
        saver.begin(1, pieces(large), CheckpointExtras())
        assert saver.finish() == Saved(1, tmp_path / "step_00000001", None)
    saver.close()
    assert [name.split("_")[0] for name in made] == ["checkpoint"]
    assert torch.equal(CheckpointStore(tmp_path, keep=1).open(1).read("large"), large["large"])


def test_the_memory_for_copies_is_there_and_not_only_promised(tmp_path: Path) -> None:
    """The kernel gives pages when they are written."""
    saver, given, real = Saver(CheckpointStore(tmp_path, keep=1), WORLD), list[Tensor](), torch.empty

    def empty(*arguments: Any, **options: Any) -> Tensor:
        given.append(real(*arguments, **options).fill_(7))
        return given[-1]

    with patch("shoestring.comm.host.torch.empty", empty):
        saver.reserve(pieces({"large": torch.zeros(1000)}))
        saver.close()
    (buffer,) = given
    assert len(buffer) >= 4000
    assert not buffer.any()


def test_for_a_gpu_the_memory_for_copies_is_pinned_at_its_size(tmp_path: Path) -> None:
    """Before `reserve` returns, since it stops a GPU; and until the saver ends."""
    pages = StandInPages()
    saver = Saver(CheckpointStore(tmp_path, keep=1), WORLD, HostMemory(pages))
    large = {"large": torch.arange(100_000.0)}
    where = "shoestring.trainer.checkpoint.saver"
    with patch(f"{where}._any_on_gpu", return_value=True), patch(f"{where}.torch.cuda.synchronize") as copied:
        saver.reserve(pieces(large))
        assert list(pages.pinned.values()) == [-(-400_000 // mmap.PAGESIZE) * mmap.PAGESIZE]
        saver.begin(1, pieces(large), CheckpointExtras())
        copied.assert_called_once()
        assert saver.finish() == Saved(1, tmp_path / "step_00000001", None)
    saver.close()
    assert pages.log == ["pin", "unpin"]
    assert torch.equal(CheckpointStore(tmp_path, keep=1).open(1).read("large"), large["large"])


def test_poll_tells_once_when_a_save_has_ended(tmp_path: Path) -> None:
    saver = Saver(CheckpointStore(tmp_path, keep=2), WORLD)
    assert saver.poll(*saver.votes()) is None
    saver.begin(1, pieces(tensors()), CheckpointExtras())
    while (saved := saver.poll(*saver.votes())) is None:
        os.sched_yield()
    assert saved == Saved(1, tmp_path / "step_00000001", None)
    assert (saver.poll(*saver.votes()), saver.finish()) == (None, None)
    saver.close()


def test_only_whole_checkpoints_count_and_the_oldest_go(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    assert store.steps() == []
    (tmp_path / "step_00000009.partial").mkdir(parents=True)  # a crash in the middle of step 9's
    (tmp_path / "step_00000008.old").mkdir()  # and in the middle of a removal
    (tmp_path / "thesis.partial").mkdir()  # somebody else's
    for step in (1, 2, 3):
        save(store, step)
    assert names(tmp_path) == ["step_00000002", "step_00000003", "thesis.partial"]
    save(store, 3, tensors(2.0))  # of a life that went on from step 2
    assert torch.equal(store.open(3).read("a"), tensors(2.0)["a"])
    assert store.steps() == [2, 3]


def crash_at(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"shoestring.trainer.checkpoint.{target}", crash)


@pytest.mark.parametrize(
    "target",
    ["saver.write_share", "saver.TensorFileWriter.write", "saver.write_file", "store.merge", "store.write_file"],
)
def test_a_save_that_dies_half_way_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 1)
    with monkeypatch.context() as patched:
        crash_at(patched, target)
        with pytest.raises(KeyboardInterrupt):
            save(store, 2, tensors(0.0))
    assert store.steps() == [1]
    assert torch.equal(store.open(1).read("a"), tensors()["a"])
    save(store, 3)
    assert store.steps() == [1, 3]
    assert names(tmp_path) == ["step_00000001", "step_00000003"]


def test_a_crash_while_old_checkpoints_go_leaves_no_half_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 1)

    def crash(path: Path) -> None:
        (path / "manifest.json").unlink()  # as far as the removal came
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("shoestring.trainer.checkpoint.store.shutil.rmtree", crash)
        save(store, 2)
    assert names(tmp_path) == ["step_00000001.old", "step_00000002"]
    assert store.steps() == [2]
    save(store, 3)
    assert names(tmp_path) == ["step_00000003"]


def test_a_save_waits_until_the_oldest_checkpoint_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both look through what removals have left; a removal of many files takes a while."""
    store, may_go_on, real = CheckpointStore(tmp_path, keep=1), threading.Event(), shutil.rmtree
    saver = Saver(store, WORLD)

    def slow(path: Path) -> None:
        assert may_go_on.wait(10)
        real(path)

    monkeypatch.setattr("shoestring.trainer.checkpoint.store.shutil.rmtree", slow)
    for step in (1, 2):
        saver.begin(step, pieces(tensors()), CheckpointExtras({"step": step}))
        assert saver.finish() == Saved(step, store.path(step), None)
    assert "step_00000002" in names(tmp_path)
    threading.Timer(0.1, may_go_on.set).start()
    saver.begin(3, pieces(tensors()), CheckpointExtras({"step": 3}))
    assert saver.finish() == Saved(3, store.path(3), None)
    saver.close()
    assert names(tmp_path) == ["step_00000003"]


def test_a_checkpoint_that_cannot_be_read_now_is_refused_and_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(CheckpointStore(tmp_path, keep=1), 1)

    def fail(path: Path, most: int) -> str:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("shoestring.trainer.checkpoint.manifest.read_text", fail)
    with pytest.raises(ConfigError, match=r"Input/output error.*cannot be read now; nothing was changed"):
        find_checkpoint(tmp_path)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("file", "harm", "message"),
    [
        ("part_00000.safetensors", truncate, "bytes instead of"),
        ("part_00000.safetensors", flip_bit, "the SHA-256 of c is not that in the manifest"),
        ("part_00000.safetensors", Path.unlink, "is missing"),
        ("manifest.json", flip_bit, "its SHA-256 is not that in complete"),
        ("manifest.json", truncate, "its SHA-256 is not that in complete"),
        ("manifest.json", Path.unlink, "is missing"),
        ("complete", Path.unlink, "is missing"),
        ("complete", flip_bit, "its SHA-256 is not that in complete"),
        ("note.txt", flip_bit, "its SHA-256 is not that in the manifest"),
    ],
)
def test_every_damage_is_found_and_named(tmp_path: Path, file: str, harm: Callable[[Path], None], message: str) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 1)
    harm(tmp_path / "step_00000001" / file)
    with pytest.raises(Damaged, match=message) as damaged:
        raise Damaged("; ".join(store.open(1).damage()))
    assert file in str(damaged.value)


def test_another_format_is_refused_and_not_taken_for_damage(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    with patch("shoestring.trainer.checkpoint.manifest.FORMAT", 4):
        save(store, 1)
    assert "this version reads format 3" in refused(store.open, 1).popitem()[1]


def test_a_tensor_that_is_not_there_or_another_is_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 1)
    for wrong, message in [
        ({"d": torch.zeros(2)}, "holds no tensor d"),
        ({"a": torch.zeros(5, 3)}, r"a is torch.float32 \[3, 5\] instead of torch.float32 \[5, 3\]"),
        ({"a": torch.zeros(3, 5, dtype=torch.float64)}, "instead of torch.float64"),
    ]:
        with pytest.raises(Damaged, match=message):
            store.open(1).fill(*pieces(wrong))


def test_a_disk_that_is_full_ends_the_save_and_frees_its_place(tmp_path: Path) -> None:
    store, saver = CheckpointStore(tmp_path, keep=2), Saver(CheckpointStore(tmp_path, keep=2), WORLD)
    save(store, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # the kernel refuses what is beyond
    try:
        saver.begin(2, pieces({"large": torch.zeros(10_000)}), CheckpointExtras())
        saved = saver.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved is not None
    assert saved.failure == f"rank 0: [Errno {errno.EFBIG}] File too large"
    assert names(tmp_path) == ["step_00000001"]
    with patch("shoestring.trainer.checkpoint.store.Path.mkdir", side_effect=OSError(errno.ENOSPC, "No space left")):
        saver.begin(3, pieces(tensors()), CheckpointExtras())
        assert (saved := saver.finish()) is not None
        assert "No space left" in str(saved.failure)
    saver.begin(4, pieces(tensors()), CheckpointExtras())
    assert saver.finish() == Saved(4, store.path(4), None)
    saver.close()


def slices(parameter: Tensor, ranks: int, rank: int) -> list[Piece]:
    """A stack of experts as an optimizer that is sharded over `ranks` holds it: runs that end inside of an expert."""
    flat = parameter.view(-1)
    size = -(-flat.numel() // ranks)
    part = StateSlice(EXP_AVG, "experts", rank * size, flat[rank * size : (rank + 1) * size])
    return list(part_pieces(part, tuple(parameter.shape), 4, rank))


def save_slices(world: World, directory: str) -> list[str]:
    topology = Topology(edp=world.size)
    group = ProcessGroups.create(topology, world.rank, timedelta(seconds=30)).world
    saver = Saver(CheckpointStore(Path(directory), keep=1), group)
    stack = torch.arange(5 * 6.0).view(5, 2, 3)
    shared = [
        piece
        for name in "abcdef"
        for piece in whole_pieces(f"{MODEL}/{name}", torch.full((4,), 1.0), tuple(range(world.size)))
    ]
    saver.begin(1, [*slices(stack, world.size, world.rank), *shared], CheckpointExtras())
    saved = saver.finish()
    saver.close()
    assert saved is not None
    assert saved.failure is None
    return [piece.name for piece in written_by(world.rank, shared)]


def test_slices_of_a_sharded_optimizer_fit_any_other_sharding(tmp_path: Path) -> None:
    written = run_processes(4, save_slices, str(tmp_path))
    assert sorted(name for own in written for name in own) == [f"{MODEL}/{name}" for name in "abcdef"]
    assert all(written)  # replicas share the work
    checkpoint = CheckpointStore(tmp_path, keep=1).open(1)
    stack = torch.arange(5 * 6.0).view(5, 2, 3)
    for expert, weights in enumerate(stack):
        assert torch.equal(checkpoint.read(f"exp_avg/experts/expert_{4 + expert:04d}"), weights)
    for ranks in (1, 3):
        loaded = torch.zeros_like(stack)
        for rank in range(ranks):
            for piece in slices(loaded, ranks, rank):
                checkpoint.fill(piece)
        assert torch.equal(loaded, stack)


def save_a_hole(world: World, directory: str) -> str | None:
    """The second rank does not save its half."""
    group = ProcessGroups.create(Topology(edp=2), world.rank, timedelta(seconds=30)).world
    saver = Saver(CheckpointStore(Path(directory), keep=1), group)
    names = frozenset(f"exp_avg/experts/expert_{expert:04d}" for expert in range(4, 8))
    saver.begin(1, slices(torch.ones(4, 2, 3), 2, 0) if world.rank == 0 else [], CheckpointExtras(names=names))
    saved = saver.finish()
    saver.close()
    return None if saved is None else saved.failure


def test_experts_that_no_rank_has_saved_are_missed(tmp_path: Path) -> None:
    failure = "rank 0: no rank has saved exp_avg/experts/expert_0006, and 1 more"
    assert run_processes(2, save_a_hole, str(tmp_path)) == [failure] * 2
    assert names(tmp_path) == []


def test_half_a_tensor_is_missed(tmp_path: Path) -> None:
    saver = Saver(CheckpointStore(tmp_path, keep=1), WORLD)
    saver.begin(1, slices(torch.ones(1, 5, 3), 2, 0), CheckpointExtras())
    assert (saved := saver.finish()) is not None
    assert saved.failure == "rank 0: exp_avg/experts/expert_0004: elements from 8 on were saved by no rank"
    saver.close()
