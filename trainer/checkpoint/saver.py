"""Saving beside the training: a step waits for the copy of the state, a thread brings the copy to the disk.

No thread communicates. Once a step the ranks say, with everything else that they sum, whether they have written; when
all of them have, the first one makes it a checkpoint. A disk that is full ends the save, not the run.
"""

from __future__ import annotations

import errno
import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...comm.groups import Group
from ...comm.host import HostMemory
from ..data.files import write_file
from .manifest import StoredPiece, record
from .pieces import Piece, written_by
from .store import CheckpointExtras, CheckpointStore
from .tensor_file import Declared, TensorFileWriter, as_bytes

FULL_DISK_SECONDS = 10.0
"""For so long no number of failed saves ends a run whose disk is full: others may make room."""
_ALIGNMENT = 16
"""Bytes; of every piece in the copy, so that it can be seen as any dtype."""


@dataclass(frozen=True)
class Saved:
    """How a save ended."""

    step: int
    path: Path
    failure: str | None
    """Why there is no such checkpoint; None where there is."""
    note: str | None = None
    """What else a person should know of the save; on the first rank alone."""


@dataclass(frozen=True)
class _Save:
    """One that is under way, in one of two phases: all ranks write, then the first one commits."""

    step: int
    cover: CheckpointExtras
    work: Future[object] | None
    """What this rank does in this phase."""
    is_written: bool = False
    note: str | None = None
    """See `Saved`."""

    @property
    def is_done(self) -> bool:
        return self.work is None or self.work.done()

    def failure(self) -> str | None:
        """Of what is done here: the disk is full or gone, or the state is not whole."""
        error = None if self.work is None or not self.work.done() else self.work.exception()
        if error is None or isinstance(error, OSError | ValueError):
            return None if error is None else str(error)
        raise error

    @property
    def found_no_room(self) -> bool:
        """Whether what is done here has failed for want of room, which may come back."""
        error = None if self.work is None or not self.work.done() else self.work.exception()
        return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


class Saver:
    """Saves the checkpoints of a run, one at a time. Every method but `reserve` and `close` is collective."""

    def __init__(self, store: CheckpointStore, world: Group, memory: HostMemory | None = None) -> None:
        """`memory` is for the copies of this rank."""
        self._store = store
        self._world = world
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._memory = HostMemory() if memory is None else memory
        self._reserved: Future[None] | None = None
        self._save: _Save | None = None
        self._letting_go: Future[None] | None = None
        self._failed_in_a_row = 0
        self._failing_since = 0.0
        self._is_patient = False

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way; the same on all ranks."""
        return self._save is not None

    def is_hopeless(self, most: int) -> bool:
        """Whether `most` saves in a row have failed; the same on all ranks.

        A disk that is full may have room again soon: then the first of them is `FULL_DISK_SECONDS` ago, too.
        """
        return self._failed_in_a_row >= most and not self._is_patient

    def reserve(self, pieces: Iterable[Piece]) -> None:
        """Find memory for the copy before the first save, which would wait until the kernel has filled its pages.

        `pieces` are those that `begin` will get. A thread does it; pinned memory, which stops a GPU for a moment, is
        had before this returns. Not collective.
        """
        own = written_by(self._world.rank, pieces)
        _, size = _places(own)
        if _any_on_gpu(own):
            self._memory.grow(size, pinned=True)
        else:
            self._reserved = self._thread.submit(self._memory.grow, size, pinned=False)

    def begin(self, step: int, pieces: Iterable[Piece], cover: CheckpointExtras) -> None:
        """Start a save; return when this rank's share of the state is copied. No other may be under way.

        `pieces` are all that this rank holds; only the first rank's `cover` is looked at.
        """
        assert self._save is None
        if self._letting_go is not None:  # it removes what `prepare` looks through
            wait([self._letting_go])
        own = written_by(self._world.rank, pieces)
        (size,) = self._sum(sum(piece.bytes for piece in own))
        prepared: Future[object] = Future()
        note = None
        if self._world.is_first:
            try:
                note = self._store.prepare(step, size)
            except OSError as error:
                prepared.set_exception(error)
        self._save = _Save(step, cover, prepared if prepared.done() else None, note=note)
        (failed,) = self._sum(prepared.done())  # also: nobody writes before there is a directory
        if not failed:
            copied = self._copied(own)
            file = f"part_{self._world.rank:05d}"
            writing: Future[object] = self._thread.submit(write_share, self._store.partial(step), file, copied)
            self._save = replace(self._save, work=writing)

    def votes(self) -> tuple[bool, bool]:
        """Whether this rank is through with a phase of the save under way, and whether it failed; for `poll`."""
        save = self._save
        return (False, False) if save is None else (save.is_done, save.failure() is not None)

    def poll(self, done: int, failed: int) -> Saved | None:
        """Once a step: how the save under way ended, if it has ended since.

        `done` and `failed` say on how many ranks the `votes` of this step were true.
        """
        save = self._save
        return self._advance(save, failed) if save is not None and done == self._world.size else None

    def finish(self) -> Saved | None:
        """Wait for the save under way, if there is one, and say how it ended."""
        saved = None
        while (save := self._save) is not None:
            if save.work is not None:
                wait([save.work])
            saved = self._advance(save, *self._sum(save.failure() is not None))
        return saved

    def close(self) -> None:
        """End the thread, when the oldest checkpoints are gone; no save may be under way."""
        self._thread.shutdown()
        self._memory.unpin()

    def _advance(self, save: _Save, failed: int) -> Saved | None:
        """All ranks are through with a phase."""
        path = self._store.path(save.step)
        if failure := self._failure_of_any(save, failed):
            if self._world.is_first:
                self._store.abandon(save.step)
            self._save = None
            return Saved(save.step, path, failure, save.note)
        if save.is_written:
            self._save = None
            self._failed_in_a_row = 0
            if self._world.is_first:
                self._letting_go = self._thread.submit(self._store.let_go)
            return Saved(save.step, path, None, save.note)
        commit: Future[object] | None = None
        if self._world.is_first:
            commit = self._thread.submit(self._store.commit, save.step, save.cover)
        self._save = replace(save, work=commit, is_written=True)
        return None

    def _sum(self, *numbers: int) -> list[int]:
        """Return the sum of each number over the ranks; of a flag, on how many ranks it is true."""
        own = torch.tensor(numbers, dtype=torch.int64)
        found: list[int] = self._world.all_reduce_sum(own, "state of a checkpoint").tolist()
        return found

    def _failure_of_any(self, save: _Save, failed: int) -> str | None:
        """In words, with the rank."""
        if not failed:
            return None
        if not self._failed_in_a_row:
            self._failing_since = time.monotonic()
        self._failed_in_a_row += 1
        own = save.failure(), save.found_no_room, time.monotonic() - self._failing_since
        gathered = self._world.all_gather_objects(own, "why a checkpoint failed")
        seconds = gathered[0][2]  # by one clock, so that all ranks come to the same end
        is_full = all(no_room for failure, no_room, _ in gathered if failure)
        self._is_patient = is_full and seconds < FULL_DISK_SECONDS
        words = ((rank, failure) for rank, (failure, *_) in zip(self._world.ranks, gathered, strict=True) if failure)
        return "; ".join(f"rank {rank}: {failure}" for rank, failure in words)

    def _copied(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces with their elements copied. The memory is kept for the next save."""
        begins, size = _places(pieces)
        on_gpu = _any_on_gpu(pieces)
        if self._reserved is not None:
            wait([self._reserved])
        self._memory.grow(size, pinned=on_gpu)
        copied = []
        for piece, begin in zip(pieces, begins, strict=True):
            flat = self._memory.bytes[begin : begin + piece.bytes].view(piece.flat.dtype)
            flat.copy_(piece.flat, non_blocking=True)  # from a GPU: not yet run on hardware
            copied.append(replace(piece, flat=flat))
        if on_gpu:
            torch.cuda.synchronize()
        return copied


def _places(pieces: Sequence[Piece]) -> tuple[list[int], int]:
    """Where each piece begins in the copy, and where it ends."""
    begins, size = [], 0
    for piece in pieces:
        begins.append(size)
        size += -(-piece.bytes // _ALIGNMENT) * _ALIGNMENT
    return begins, size


def _any_on_gpu(pieces: Sequence[Piece]) -> bool:
    return any(piece.flat.is_cuda for piece in pieces)


def write_share(directory: Path, name: str, pieces: Sequence[Piece]) -> None:
    """Write one rank's file of tensors and, beside it, its record of them; on disk when it returns.

    One thread writes and waits for the disk while two others hash, which takes as long as writing.
    """
    declared = [Declared(p.key, p.flat.dtype, p.shape if p.is_whole else tuple(p.flat.shape)) for p in pieces]
    path = directory / f"{name}.safetensors"
    with ThreadPoolExecutor(2, thread_name_prefix="checkpoint-hash") as hashing:
        hashes = [hashing.submit(_sha256, piece) for piece in pieces]
        try:
            with TensorFileWriter(path, declared) as file:
                for piece, each in zip(pieces, declared, strict=True):
                    file.write(piece.flat.view(each.shape))
        except BaseException:
            hashing.shutdown(cancel_futures=True)
            raise
        stored = [
            (
                Declared(piece.name, piece.flat.dtype, piece.shape),
                StoredPiece(path.name, file.begins[piece.key], piece.first, piece.flat.numel(), sha256.result()),
            )
            for piece, sha256 in zip(pieces, hashes, strict=True)
        ]
    write_file(directory / f"{name}.json", json.dumps(record(path.name, path.stat().st_size, stored)).encode())


def _sha256(piece: Piece) -> str:
    return hashlib.sha256(as_bytes(piece.flat)).hexdigest()
