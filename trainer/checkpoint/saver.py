"""Asynchronous saving: a step waits until the state is copied, and a thread writes the copy to disk.

No thread communicates. Once per step the step reduction counts the ranks that have written; when all have, rank 0
commits the checkpoint. A full disk ends the save, not the run.
"""

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
from .tensor_file import TensorFileWriter, tensor_as_bytes

FULL_DISK_GRACE_SECONDS = 10.0
"""Time during which saves that fail on a full disk do not end the run, however many there are."""
_ALIGNMENT = 16
"""Bytes to which each piece in the copy is aligned, so that it can be viewed as any dtype."""


@dataclass(frozen=True)
class SaveResult:
    """Result of a save."""

    step: int
    path: Path
    failure: str | None
    """Reason why there is no checkpoint; None if there is one."""
    warning: str | None = None
    """Warning about the save; on rank 0 only."""


@dataclass(frozen=True)
class _Save:
    """Save in flight, in one of two phases: all ranks write, then rank 0 commits."""

    step: int
    extras: CheckpointExtras
    work: Future[object] | None
    """This rank's work in the current phase."""
    is_written: bool = False
    note: str | None = None
    """The later `SaveResult.warning`."""

    @property
    def is_done(self) -> bool:
        return self.work is None or self.work.done()

    @property
    def _error(self) -> BaseException | None:
        return self.work.exception() if self.work is not None and self.work.done() else None

    def failure(self) -> str | None:
        """Return this rank's failure (disk full or gone, state incomplete), or None."""
        error = self._error
        if error is None or isinstance(error, OSError | ValueError):
            return None if error is None else str(error)
        raise error

    @property
    def found_no_room(self) -> bool:
        """True if this rank has failed for lack of disk space."""
        error = self._error
        return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


class CheckpointSaver:
    """Saver of a run's checkpoints, one at a time. All methods are collective except `reserve_memory` and `close`."""

    def __init__(self, store: CheckpointStore, world: Group) -> None:
        """Save into `store`."""
        self._store = store
        self._world = world
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._memory = GrowableHostBuffer()
        self._reserved: Future[None] | None = None
        self._save: _Save | None = None
        self._removing_oldest: Future[None] | None = None
        self._failed_in_a_row = 0
        self._failing_since = 0.0
        self._awaits_disk_space = False

    @property
    def is_saving(self) -> bool:
        """True while a save is in flight; equal on all ranks."""
        return self._save is not None

    def has_failed_repeatedly(self, most: int) -> bool:
        """Return whether `most` saves in a row have failed; equal on all ranks.

        On a full disk, the first of them must also be `FULL_DISK_GRACE_SECONDS` ago: space may be freed.
        """
        return self._failed_in_a_row >= most and not self._awaits_disk_space

    def reserve_memory(self, pieces: Iterable[TensorPiece]) -> None:
        """Allocate the memory of the copy before the first save, which would wait for the kernel to fill its pages.

        `pieces` are those that `begin_save` will get. A thread allocates it; pinned memory, whose allocation stops the
        GPU for a moment, is allocated before this returns. Not collective.
        """
        rank_pieces = pieces_to_write(self._world.rank, pieces)
        _, size = _byte_offsets(rank_pieces)
        if _any_on_gpu(rank_pieces):
            self._memory.grow(size, pinned=True)
        else:
            self._reserved = self._thread.submit(self._memory.grow, size, pinned=False)

    def begin_save(self, step: int, pieces: Iterable[TensorPiece], extras: CheckpointExtras) -> None:
        """Start a save; return when this rank's share of the state is copied. No other save may be in flight.

        `pieces` are all that this rank holds; only rank 0's `extras` are used.
        """
        assert self._save is None
        if self._removing_oldest is not None:  # it removes directories that `prepare_save` lists
            wait([self._removing_oldest])
        rank_pieces = pieces_to_write(self._world.rank, pieces)
        size = self._sum(sum(piece.nbytes for piece in rank_pieces))
        prepared: Future[object] = Future()
        note = None
        if self._world.is_first_rank:
            try:
                note = self._store.prepare_save(step, size)
            except OSError as error:
                prepared.set_exception(error)
        self._save = _Save(step, extras, prepared if prepared.done() else None, note=note)
        failed = self._sum(prepared.done())  # also a barrier: no rank writes before the directory exists
        if not failed:
            copied = self._copy_to_host(rank_pieces)
            file = f"part_{self._world.rank:05d}"
            writing: Future[object] = self._thread.submit(write_rank_file, self._store.partial_path(step), file, copied)
            self._save = replace(self._save, work=writing)

    def save_votes(self) -> tuple[bool, bool]:
        """Return whether this rank has finished the phase of the save in flight, and whether it failed."""
        save = self._save
        return (False, False) if save is None else (save.is_done, save.failure() is not None)

    def poll_save(self, done: int, failed: int) -> SaveResult | None:
        """Return the result of the save in flight if it has ended; called once per step.

        `done` and `failed` are the numbers of ranks on which the `save_votes` of this step were true.
        """
        save = self._save
        return self._advance(save, failed) if save is not None and done == self._world.size else None

    def finish_save(self) -> SaveResult | None:
        """Wait for the save in flight, if there is one, and return its result."""
        saved = None
        while (save := self._save) is not None:
            if save.work is not None:
                wait([save.work])
            saved = self._advance(save, self._sum(save.failure() is not None))
        return saved

    def close(self) -> None:
        """Stop the thread after it has removed the oldest checkpoints; no save may be in flight."""
        self._thread.shutdown()
        self._memory.unpin()

    def _advance(self, save: _Save, failed: int) -> SaveResult | None:
        """Advance to the next phase once all ranks have finished this one; return the result after the last phase."""
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
                self._removing_oldest = self._thread.submit(self._store.remove_oldest)
            return SaveResult(save.step, path, None, save.note)
        commit: Future[object] | None = None
        if self._world.is_first_rank:
            commit = self._thread.submit(self._store.commit_save, save.step, save.extras)
        self._save = replace(save, work=commit, is_written=True)
        return None

    def _sum(self, number: int) -> int:
        """Return the sum of a number over the ranks; of a flag, on how many ranks it is true."""
        local = torch.tensor([number], dtype=torch.int64)
        return int(self._world.all_reduce_sum(local, "state of a checkpoint"))

    def _failure_of_any(self, save: _Save, failed: int) -> str | None:
        """Return the failures of all ranks as text, or None. Collective if `failed` is not 0."""
        if not failed:
            return None
        if not self._failed_in_a_row:
            self._failing_since = time.monotonic()
        self._failed_in_a_row += 1
        local = save.failure(), save.found_no_room, time.monotonic() - self._failing_since
        gathered = self._world.all_gather_objects(local, "why a checkpoint failed")
        seconds = gathered[0][2]  # rank 0's clock, so that all ranks decide alike
        is_full = all(no_room for failure, no_room, _ in gathered if failure)
        self._awaits_disk_space = is_full and seconds < FULL_DISK_GRACE_SECONDS
        words = ((rank, failure) for rank, (failure, *_) in zip(self._world.ranks, gathered, strict=True) if failure)
        return "; ".join(f"rank {rank}: {failure}" for rank, failure in words)

    def _copy_to_host(self, pieces: Sequence[TensorPiece]) -> list[TensorPiece]:
        """Return `pieces` with their elements copied to host memory, which is kept for the next save."""
        begins, size = _byte_offsets(pieces)
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


def _byte_offsets(pieces: Sequence[TensorPiece]) -> tuple[list[int], int]:
    """Return the byte offset of each piece in the copy, and the size of the copy."""
    begins, size = [], 0
    for piece in pieces:
        begins.append(size)
        size += -(-piece.nbytes // _ALIGNMENT) * _ALIGNMENT
    return begins, size


def _any_on_gpu(pieces: Sequence[TensorPiece]) -> bool:
    return any(piece.flat.is_cuda for piece in pieces)


def write_rank_file(directory: Path, name: str, pieces: Sequence[TensorPiece]) -> None:
    """Write one rank's tensor file and its JSON record; both are on disk when this returns."""
    # Hashing takes as long as writing: two threads hash while this one writes and waits for the disk.
    declared = [piece.in_file for piece in pieces]
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
        begins = (file.byte_offsets[each.name] for each in declared)
        stored = [
            (piece.whole, StoredPiece(path.name, begin, piece.element_offset, piece.flat.numel(), sha256.result()))
            for piece, begin, sha256 in zip(pieces, begins, hashes, strict=True)
        ]
    record = make_rank_record(path.name, path.stat().st_size, stored)
    write_file_durably(directory / f"{name}.json", json.dumps(record).encode())


def _sha256(piece: TensorPiece) -> str:
    return hashlib.sha256(tensor_as_bytes(piece.flat)).hexdigest()
