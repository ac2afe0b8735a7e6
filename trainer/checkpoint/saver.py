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
from ...comm.host_transfer import GrowableHostBuffer
from ..data.files import write_file_durably
from .manifest import StoredPiece, make_rank_record
from .pieces import TensorPiece, pieces_to_write
from .store import CheckpointExtras, CheckpointStore
from .tensor_file import TensorFileWriter, TensorSpec, tensor_as_bytes

FULL_DISK_GRACE_SECONDS = 10.0
"""For so long no number of failed saves ends a run whose disk is full: others may make room."""
_ALIGNMENT = 16
"""Bytes; of every piece in the copy, so that it can be seen as any dtype."""


@dataclass(frozen=True)
class SaveResult:
    """How a save ended."""

    step: int
    path: Path
    failure: str | None
    """Why there is no such checkpoint; None where there is."""
    warning: str | None = None
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
    """See `SaveResult`."""

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


class CheckpointSaver:
    """Saves the checkpoints of a run, one at a time. Every method but `reserve` and `close` is collective."""

    def __init__(self, store: CheckpointStore, world: Group, memory: GrowableHostBuffer | None = None) -> None:
        """`memory` is for the copies of this rank."""
        self._store = store
        self._world = world
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._memory = GrowableHostBuffer() if memory is None else memory
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

    def has_failed_repeatedly(self, most: int) -> bool:
        """Whether `most` saves in a row have failed; the same on all ranks.

        A disk that is full may have room again soon: then the first of them is `FULL_DISK_GRACE_SECONDS` ago, too.
        """
        return self._failed_in_a_row >= most and not self._is_patient

    def reserve_memory(self, pieces: Iterable[TensorPiece]) -> None:
        """Find memory for the copy before the first save, which would wait until the kernel has filled its pages.

        `pieces` are those that `begin` will get. A thread does it; pinned memory, which stops a GPU for a moment, is
        had before this returns. Not collective.
        """
        own = pieces_to_write(self._world.rank, pieces)
        _, size = _places(own)
        if _any_on_gpu(own):
            self._memory.grow(size, pinned=True)
        else:
            self._reserved = self._thread.submit(self._memory.grow, size, pinned=False)

    def begin_save(self, step: int, pieces: Iterable[TensorPiece], cover: CheckpointExtras) -> None:
        """Start a save; return when this rank's share of the state is copied. No other may be under way.

        `pieces` are all that this rank holds; only the first rank's `cover` is looked at.
        """
        assert self._save is None
        if self._letting_go is not None:  # it removes what `prepare` looks through
            wait([self._letting_go])
        own = pieces_to_write(self._world.rank, pieces)
        (size,) = self._sum(sum(piece.nbytes for piece in own))
        prepared: Future[object] = Future()
        note = None
        if self._world.is_first_rank:
            try:
                note = self._store.prepare_save(step, size)
            except OSError as error:
                prepared.set_exception(error)
        self._save = _Save(step, cover, prepared if prepared.done() else None, note=note)
        (failed,) = self._sum(prepared.done())  # also: nobody writes before there is a directory
        if not failed:
            copied = self._copied(own)
            file = f"part_{self._world.rank:05d}"
            writing: Future[object] = self._thread.submit(write_rank_file, self._store.partial_path(step), file, copied)
            self._save = replace(self._save, work=writing)

    def save_votes(self) -> tuple[bool, bool]:
        """Whether this rank is through with a phase of the save under way, and whether it failed; for `poll`."""
        save = self._save
        return (False, False) if save is None else (save.is_done, save.failure() is not None)

    def poll_save(self, done: int, failed: int) -> SaveResult | None:
        """Once a step: how the save under way ended, if it has ended since.

        `done` and `failed` say on how many ranks the `votes` of this step were true.
        """
        save = self._save
        return self._advance(save, failed) if save is not None and done == self._world.size else None

    def finish_save(self) -> SaveResult | None:
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

    def _advance(self, save: _Save, failed: int) -> SaveResult | None:
        """All ranks are through with a phase."""
        path = self._store.checkpoint_path(save.step)
        if failure := self._failure_of_any(save, failed):
            if self._world.is_first_rank:
                self._store.discard_partial_save(save.step)
            self._save = None
            return SaveResult(save.step, path, failure, save.note)
        if save.is_written:
            self._save = None
            self._failed_in_a_row = 0
            if self._world.is_first_rank:
                self._letting_go = self._thread.submit(self._store.remove_oldest)
            return SaveResult(save.step, path, None, save.note)
        commit: Future[object] | None = None
        if self._world.is_first_rank:
            commit = self._thread.submit(self._store.commit_save, save.step, save.cover)
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
        self._is_patient = is_full and seconds < FULL_DISK_GRACE_SECONDS
        words = ((rank, failure) for rank, (failure, *_) in zip(self._world.ranks, gathered, strict=True) if failure)
        return "; ".join(f"rank {rank}: {failure}" for rank, failure in words)

    def _copied(self, pieces: Sequence[TensorPiece]) -> list[TensorPiece]:
        """The pieces with their elements copied. The memory is kept for the next save."""
        begins, size = _places(pieces)
        on_gpu = _any_on_gpu(pieces)
        if self._reserved is not None:
            wait([self._reserved])
        self._memory.grow(size, pinned=on_gpu)
        copied = []
        for piece, begin in zip(pieces, begins, strict=True):
            flat = self._memory.tensor[begin : begin + piece.nbytes].view(piece.flat.dtype)
            flat.copy_(piece.flat, non_blocking=True)  # from a GPU: not yet run on hardware
            copied.append(replace(piece, flat=flat))
        if on_gpu:
            torch.cuda.synchronize()
        return copied


def _places(pieces: Sequence[TensorPiece]) -> tuple[list[int], int]:
    """Where each piece begins in the copy, and where it ends."""
    begins, size = [], 0
    for piece in pieces:
        begins.append(size)
        size += -(-piece.nbytes // _ALIGNMENT) * _ALIGNMENT
    return begins, size


def _any_on_gpu(pieces: Sequence[TensorPiece]) -> bool:
    return any(piece.flat.is_cuda for piece in pieces)


def write_rank_file(directory: Path, name: str, pieces: Sequence[TensorPiece]) -> None:
    """Write one rank's file of tensors and, beside it, its record of them; on disk when it returns.

    One thread writes and waits for the disk while two others hash, which takes as long as writing.
    """
    declared = [
        TensorSpec(p.file_key, p.flat.dtype, p.shape if p.is_whole_tensor else tuple(p.flat.shape)) for p in pieces
    ]
    path = directory / f"{name}.safetensors"
    with ThreadPoolExecutor(2, thread_name_prefix="checkpoint-hash") as hashing:
        hashes = [hashing.submit(_sha256, piece) for piece in pieces]
        try:
            with TensorFileWriter(path, declared) as file:
                for piece, each in zip(pieces, declared, strict=True):
                    file.write_tensor(piece.flat.view(each.shape))
        except BaseException:
            hashing.shutdown(cancel_futures=True)
            raise
        stored = [
            (
                TensorSpec(piece.name, piece.flat.dtype, piece.shape),
                StoredPiece(
                    path.name,
                    file.byte_offsets[piece.file_key],
                    piece.element_offset,
                    piece.flat.numel(),
                    sha256.result(),
                ),
            )
            for piece, sha256 in zip(pieces, hashes, strict=True)
        ]
    write_file_durably(
        directory / f"{name}.json", json.dumps(make_rank_record(path.name, path.stat().st_size, stored)).encode()
    )


def _sha256(piece: TensorPiece) -> str:
    return hashlib.sha256(tensor_as_bytes(piece.flat)).hexdigest()
