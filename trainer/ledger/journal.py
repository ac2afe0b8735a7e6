"""Append-only, hash-chained, fsynced journal: records survive crashes, and a changed record is detected.

Each line is one JSON object. Its `hash` is SHA-256 over the hash of the line before and the canonical JSON of the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
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
from ...comm.files.strict_json import MalformedFileError, UnsupportedFormatError, parse_json
from .record_batch import (
    MAX_BATCH_RECORDS,
    LineFields,
    RecordBatch,
    can_share_batch,
    make_record_batch,
    parse_chained_line,
)

Record = dict[str, Any]

_RESTORE = "restore the file"

GENESIS_HASH = "0" * 64
"""Hash that the first line is chained to."""


def read_journal(path: Path) -> list[Record]:
    """Return the records of the journal at `path`, each with its `hash`; empty without a file.

    A last line without newline is being written or was cut by a crash, and is ignored. Raises `ConfigError` with the
    line number if the chain is broken.
    """
    return JournalReader(path).new_records()


def _accept(record: Record) -> None:
    """Accept any record."""


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

    def __init__(
        self, path: Path, start: JournalPosition | None = None, *, check: Callable[[Record], None] = _accept
    ) -> None:
        """Begin at `start` (see `is_valid_position`), or at the beginning.

        `check` raises `MalformedFileError` for an invalid record; the reader raises `ConfigError` with its line.
        """
        self._path = path
        self._check = check
        begin = JournalPosition() if start is None else start
        self._position, self._number = begin.position, begin.number
        self.head = begin.head
        """Hash of the last record read."""

    @property
    def position(self) -> JournalPosition:
        """Position after the last record read."""
        return JournalPosition(self._position, self._number, self.head)

    def new_records(self) -> list[Record]:
        """Return the records appended since the last call. Raises `ConfigError` like `read_journal`, or if truncated.

        After an error the reader must not be used again.
        """
        return list(self.stream_records())

    def check_first_record(self) -> None:
        """Raise `ConfigError` where the first record is refused; the reader stays where it is."""
        for line in self._lines(1):
            self._checked(line, 1, GENESIS_HASH)

    def file_size(self) -> int:
        """Return the current size of the file in bytes; 0 without a file."""
        return self._path.stat().st_size if self._path.exists() else 0

    def stream_records(self, end: int | None = None) -> Iterator[Record]:
        """Yield the new records that begin before byte `end`."""
        for line in self._lines(end):
            yield self._read(line)

    def stream_batches(self, end: int | None = None) -> Iterator[Record | RecordBatch]:
        """Yield the new records that begin before byte `end`, with consecutive steps and intervals in batches."""
        rows: list[LineFields] = []
        head, size = self.head.encode(), 0
        for line in self._lines(end):
            row = parse_chained_line(line, head)
            if rows and (row is None or len(rows) == MAX_BATCH_RECORDS or not can_share_batch(rows[0], row)):
                yield self._batch(rows, size)
                rows, size = [], 0
            if row is None:
                yield self._read(line)
                head = self.head.encode()
            else:
                rows.append(row)
                head, size = row[5], size + len(line)
        if rows:
            yield self._batch(rows, size)

    def _batch(self, rows: list[LineFields], size: int) -> RecordBatch:
        """Return the batch of `rows`, lines of `size` bytes, and advance past them."""
        self._position += size
        self._number += len(rows)
        self.head = rows[-1][5].decode()
        return make_record_batch(rows)

    def _lines(self, end: int | None) -> Iterator[bytes]:
        """Yield the whole lines from the current position to byte `end`, without advancing."""
        if not self._path.exists():
            return
        with config_error_context(self._path, _RESTORE), open_regular_file(self._path) as file:
            if file.seek(0, os.SEEK_END) < self._position:
                hint = "the journal is shorter than when it was last read; restore the file"
                raise ConfigError([Problem(str(self._path), self._position, hint)])
            position = file.seek(self._position)
            for line in read_bounded_lines(file, _MAX_RECORD_BYTES):
                if not line.endswith(b"\n") or (end is not None and position >= end):
                    return
                position += len(line)
                yield line

    def _read(self, line: bytes) -> Record:
        """Return the record of the next line, and advance past it."""
        self._number += 1
        record = self._checked(line, self._number, self.head)
        self._position += len(line)
        self.head = record["hash"]
        return record

    def _checked(self, line: bytes, number: int, head: str) -> Record:
        """Return the record of `line`. Raises `ConfigError` unless it is chained to `head`."""
        if is_chained(line, head):
            found = _parse_plain(line)
            if found is not None:
                self._check_record(found, number)
                return found
        record = _parse(line.decode(errors="replace"))
        if record.get("hash") != _link(head, {key: value for key, value in record.items() if key != "hash"}):
            hint = "the chain of hashes is broken: this line or one before it was changed; restore the file"
            raise ConfigError([Problem(f"{self._path}:{number}", line.decode(errors="replace")[:80], hint)])
        self._check_record(record, number)
        return record

    def _check_record(self, record: Record, number: int) -> None:
        try:
            self._check(record)
        except UnsupportedFormatError as error:
            raise error.to_config_error(f"{self._path}:{number}") from error
        except MalformedFileError as error:
            hint = f"{_RESTORE}, or read it with the version of Shoestring that wrote it"
            raise ConfigError([error.to_problem(f"{self._path}:{number}", hint)]) from error


def _parse_plain(line: bytes) -> Record | None:
    """Parse most lines in less than half the time of `_parse`; None for a line that needs `_parse`."""
    if b"\\" in line or b"[" in line:
        return None
    try:
        text = line.decode()
        found, end = _DECODER.raw_decode(text)  # `json.loads` takes half as long again
    except (ValueError, RecursionError):
        return None
    is_plain = type(found) is dict and line.count(b'":') == len(found) and end == len(text) - 1  # no key twice
    return found if is_plain else None


def _no_number(name: str) -> float:
    raise ValueError(name)


_DECODER = json.JSONDecoder(parse_constant=_no_number)
_HASH = re.compile(rb',"hash":"([0-9a-f]{64})"|"hash":"([0-9a-f]{64})",?')


def is_chained(line: bytes, head: str) -> bool:
    """Return True if `line` is canonical and chained to `head`; parsing it would take three times as long."""
    found = _HASH.search(line)
    if found is None:
        return False
    content = line[: found.start()] + line[found.end() : -1]
    return hashlib.sha256(head.encode() + content).hexdigest().encode() in found.groups()


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
    found = _HASH.search(last[last.rfind(b"\n", 0, -1) + 1 :])
    return found is not None and place.head.encode() in found.groups()


_MAX_RECORD_BYTES = 2**20
"""Largest record in bytes."""


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


def _parse(line: str) -> Record:
    """Return the object on `line`, or an empty one, which no chain contains."""
    try:
        return parse_json(line).as_mapping()
    except MalformedFileError:
        return {}


def _link(head: str, content: Mapping[str, Any]) -> str:
    return hashlib.sha256((head + _canonical(content)).encode()).hexdigest()


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
        head = _link(self._head, content)
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
    for _ in reader.stream_records():
        pass
    return reader.head


_LOCKED_HINT = "another process is writing this journal: the run is already active; wait for it or stop it"


def refuse_if_locked(path: Path) -> None:
    """Raise `ConfigError` while another process writes the journal at `path`; changes nothing."""
    if path.is_file():
        with path.open("rb") as file:
            acquire_exclusive_lock(file.fileno(), str(path), None, _LOCKED_HINT)


def _unwritable_error(path: Path, reason: str | None) -> ConfigError:
    hint = f"cannot be written ({reason}); free disk space, or name another training.run_dir"
    return ConfigError([Problem(str(path), None, hint)])
