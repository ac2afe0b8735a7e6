"""Append-only, hash-chained, fsynced journal: records survive crashes, and a changed record is detected.

Each line is one JSON object. Its `hash` is SHA-256 over the hash of the line before and the canonical JSON of the rest.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...comm.errors import ConfigError, Problem
from ...comm.files.file_io import (
    config_error_context,
    open_regular_file,
    raise_if_not_regular_file,
    read_bounded_lines,
    read_line_blocks,
)
from ...comm.files.line_reader import truncate_partial_line
from ...comm.files.line_writer import MAX_BACKLOG_BYTES, LineWriter
from ...comm.files.lock import acquire_exclusive_lock
from ...comm.files.strict_json import MalformedFileError

_RESTORE = "restore the file"
_MAX_RECORD_BYTES = 2**20
"""Largest record in bytes."""

GENESIS_HASH = "0" * 64
"""Hash that the first line is chained to."""
_END_OF_HASH = len(GENESIS_HASH) + 1
"""Bytes of a hash with its closing quote."""


@dataclass(frozen=True)
class JournalPosition:
    """Reading position in a journal: its start, or the end of a record."""

    position: int = 0
    """Bytes before the position."""
    number: int = 0
    """Records before the position."""
    head: str = GENESIS_HASH
    """Hash of the last record before the position."""


class JournalReader:
    """Incremental reader of a growing journal; a long run reads its cost at every checkpoint."""

    def __init__(self, path: Path, start: JournalPosition | None = None) -> None:
        """Begin at `start` (see `is_valid_position`), or at the beginning."""
        self.path = path
        begin = JournalPosition() if start is None else start
        self._position, self._number, self._head = begin.position, begin.number, begin.head.encode()

    @property
    def position(self) -> JournalPosition:
        """Position after the last line read."""
        return JournalPosition(self._position, self._number, self._head.decode())

    def file_size(self) -> int:
        """Return the current size of the file in bytes; 0 without a file."""
        return self.path.stat().st_size if self.path.exists() else 0

    def stream_lines(self, end: int | None = None) -> Iterator[bytes]:
        """Yield the new lines that begin before byte `end`, each chained to the one before it; none without a file.

        A last line without newline is being written or was cut by a crash, and is ignored. Raises `ConfigError` with
        the line number if the chain is broken, or if the file was truncated; the reader must not be used again.
        """
        if not self.path.exists():
            return
        with config_error_context(self.path, _RESTORE), open_regular_file(self.path) as file:
            if file.seek(0, os.SEEK_END) < self._position:
                hint = "the journal is shorter than when it was last read; restore the file"
                raise ConfigError([Problem(str(self.path), self._position, hint)])
            file.seek(self._position)
            for line in read_bounded_lines(file, _MAX_RECORD_BYTES):
                if not line.endswith(b"\n") or (end is not None and self._position >= end):
                    return
                content, found = _split_hash(line)
                self._number += 1
                if hashlib.sha256(self._head + content).hexdigest().encode() != found:
                    hint = "the chain of hashes is broken: this line or one before it was changed; restore the file"
                    shown = line.decode(errors="replace")[:80]
                    raise ConfigError([Problem(f"{self.path}:{self._number}", shown, hint)])
                self._position += len(line)
                self._head = found
                yield line


def _split_hash(line: bytes) -> tuple[bytes, bytes]:
    """Return the text of `line` without its hash, and the hash; without one, an empty hash, which no chain contains."""
    # As text: parsing takes three times as long. In a canonical line no text value contains these quotes unescaped.
    before, _, rest = line.partition(b',"hash":"')
    if rest:
        return before + rest[_END_OF_HASH:-1], rest[: _END_OF_HASH - 1]
    before, _, rest = line.partition(b'"hash":"')  # its first key
    return before + rest[_END_OF_HASH:-1].removeprefix(b","), rest[: _END_OF_HASH - 1]


def is_valid_position(path: Path, place: JournalPosition) -> bool:
    """Return True if the record with the hash `place.head` ends at `place` in the journal at `path`."""
    if place.position == 0:
        return place == JournalPosition()
    try:
        with open_regular_file(path) as file:
            begin = max(0, place.position - _MAX_RECORD_BYTES)
            file.seek(begin)
            last = file.read(place.position - begin)
    except (OSError, MalformedFileError):
        return False
    if len(last) != place.position - begin or not last.endswith(b"\n"):
        return False
    return _split_hash(last[last.rfind(b"\n", 0, -1) + 1 :])[1] == place.head.encode()


def contains_record(path: Path, head: str) -> bool:
    """Return True if the journal at `path` has a record with this hash. Raises `ConfigError` like `contains_any`."""
    return contains_any(path, f'"hash":"{head}"'.encode())


def contains_any(path: Path, *words: bytes) -> bool:
    """Search the unparsed lines of `path` for any of `words`, each at most 1 MiB.

    Raises `ConfigError` if it cannot be read, or has a line of more than `MAX_LINE_BYTES`.
    """
    if not path.is_file():
        return False
    with config_error_context(path, _RESTORE), open_regular_file(path) as file:
        rest = b""
        for chunk in read_line_blocks(file):
            if any(word in rest + chunk for word in words):
                return True
            rest = chunk[-_MAX_RECORD_BYTES:]
    return False


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


class JournalWriter:
    """Exclusive writer of a journal. Raises `ConfigError` for a broken chain or another writer of the file.

    A record survives a crash of the process as soon as `append` returns, and of the machine within `sync_seconds`:
    waiting for the disk after each short step would cost more than the record is worth. Records that a full disk does
    not take wait in memory (see `LineWriter`). Not thread-safe.
    """

    def __init__(
        self,
        path: Path,
        *,
        sync_seconds: float = 0.0,
        backlog_bytes: int = MAX_BACKLOG_BYTES,
        find_head: Callable[[], str] | None = None,
    ) -> None:
        """Open or create the journal; `find_head` returns the hash of its last record.

        Without `find_head` every record is read.
        """
        self._path = path
        self._sync_seconds = sync_seconds
        self._synced_at = time.monotonic()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            raise_if_not_regular_file(path)
            self._lock = path.open("ab", buffering=0)
        except OSError as error:
            raise _unwritable_error(path, error.strerror) from error
        try:
            acquire_exclusive_lock(self._lock.fileno(), str(path), None, _LOCKED_HINT)
            truncate_partial_line(path)
            self._head = _last_hash(path) if find_head is None else find_head()
            self._writer = LineWriter(path, max_backlog_bytes=backlog_bytes)
        except BaseException:
            self._lock.close()
            raise

    @property
    def pending_records(self) -> int:
        """Records that are not in the file yet."""
        return self._writer.pending_lines

    @property
    def write_error(self) -> str | None:
        """Reason why records are not in the file; None if all are."""
        return self._writer.write_error

    @property
    def is_file_removed(self) -> bool:
        """True if the file was deleted."""
        return self._writer.is_deleted

    def append(self, content: Mapping[str, Any]) -> bool:
        """Write `content`, without a key `hash`, as one line; return False if it was dropped for lack of memory.

        A dropped record is not in the chain: the next one follows the one before it.
        """
        head = hashlib.sha256((self._head + _canonical(content)).encode()).hexdigest()
        if not self._writer.append((_canonical({**content, "hash": head}) + "\n").encode()):
            return False
        self._head = head
        if time.monotonic() - self._synced_at >= self._sync_seconds:
            self.sync()
        return True

    def require_written(self) -> None:
        """Raise `ConfigError` unless every record so far is in the file."""
        if self._writer.pending_lines:
            reason = self._writer.write_error
            self.close()
            raise _unwritable_error(self._path, reason)

    def sync(self) -> None:
        """Sync the written records to disk."""
        self._writer.fsync()
        self._synced_at = time.monotonic()

    def close(self) -> None:
        """Close the file and release its lock."""
        self._writer.close()
        self._lock.close()


def _last_hash(path: Path) -> str:
    reader = JournalReader(path)
    for _ in reader.stream_lines():
        pass
    return reader.position.head


_LOCKED_HINT = "another process is writing this journal: the run is already active; wait for it or stop it"


def refuse_if_locked(path: Path) -> None:
    """Raise `ConfigError` while another process writes the journal at `path`; changes nothing."""
    if path.is_file():
        with path.open("rb") as file:
            acquire_exclusive_lock(file.fileno(), str(path), None, _LOCKED_HINT)


def _unwritable_error(path: Path, reason: str | None) -> ConfigError:
    hint = f"cannot be written ({reason}); free disk space, or name another training.run_dir"
    return ConfigError([Problem(str(path), None, hint)])
