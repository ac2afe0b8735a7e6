"""Append-only, hash-chained, fsynced lines: a record that was written stays written, and an edited one is noticed.

Each line is one JSON object. Its `hash` is SHA-256 over the hash of the line before and the canonical JSON of the rest.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...comm.files import open_regular, refuse_links, refusing
from ...comm.refusal import Problem, Refused
from ...comm.strict import Malformed, parse_json
from ..telemetry.lines import cut_torn_line

Record = dict[str, Any]

_RESTORE = "restore the file"

GENESIS = "0" * 64
"""What the first line is chained to."""


def read_journal(path: Path) -> list[Record]:
    """The records of the journal at `path`, each with its `hash`; none when there is no such file.

    A last line without newline is still being written, or was torn by a crash, and is left out. Raises Refused, naming
    the line, where the chain is broken.
    """
    return JournalReader(path).new_records()


def _accept(record: Record) -> None:
    """Any object will do."""


class JournalReader:
    """Reads a journal while it grows: a run of months is asked for its cost at every checkpoint."""

    def __init__(self, path: Path, check: Callable[[Record], None] = _accept) -> None:
        """`check` raises `Malformed` for a record that does not hold what it must; it is refused with its line."""
        self._path = path
        self._check = check
        self._position = 0
        self._number = 0
        self.head = GENESIS
        """The hash of the last record read."""

    def new_records(self) -> list[Record]:
        """What has been appended since the last call. Raises Refused as `read_journal` does, and for a file cut short.

        After a refusal the reader is not to be used again.
        """
        return list(self._read()) if self._path.exists() else []

    def _read(self) -> Iterator[Record]:
        with refusing(self._path, _RESTORE), open_regular(self._path) as file:
            if file.seek(0, os.SEEK_END) < self._position:
                remedy = "the journal is shorter than when it was last read; restore the file"
                raise Refused([Problem(str(self._path), self._position, remedy)])
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._position += len(line)
                self._number += 1
                yield self._checked(line.decode(errors="replace"))

    def _checked(self, line: str) -> Record:
        record = _parse(line)
        self.head = _link(self.head, {key: value for key, value in record.items() if key != "hash"})
        if record.get("hash") != self.head:
            remedy = "the chain of hashes is broken: this line or one before it was changed; restore the file"
            raise Refused([Problem(f"{self._path}:{self._number}", line[:80], remedy)])
        try:
            self._check(record)
        except Malformed as error:
            remedy = f"{_RESTORE}, or read it with the version of Shoestring that wrote it"
            raise Refused([error.problem(f"{self._path}:{self._number}", remedy)]) from error
        return record


def _parse(line: str) -> Record:
    """The object on `line`, or an empty one, which no chain contains."""
    try:
        return parse_json(line).mapping()
    except Malformed:
        return {}


def _link(head: str, content: Mapping[str, Any]) -> str:
    return hashlib.sha256((head + _canonical(content)).encode()).hexdigest()


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


class Journal:
    """The one writer of a journal. Raises Refused when the chain is broken or another writer holds the file.

    A record survives the death of its writer as soon as `append` returns, and that of the machine within
    `sync_seconds`: waiting for the disk after each short step would cost more than the step's record is worth. Not for
    several threads at once: the owner locks.
    """

    def __init__(self, path: Path, *, sync_seconds: float = 0.0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._sync_seconds = sync_seconds
        self._synced_at = time.monotonic()
        self._path = path
        refuse_links(path)
        self._file = path.open("ab", buffering=0)
        try:
            # Released by the kernel when the process ends, however it ends.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            remedy = "another process is writing this journal: the run is already going on; wait for it or stop it"
            raise Refused([Problem(str(path), None, remedy)]) from error
        self._settle()

    def _settle(self) -> None:
        """Cut a torn line and find the end of the chain."""
        cut_torn_line(self._path)
        reader = JournalReader(self._path)
        reader.new_records()
        self._head = reader.head
        self._settled = True

    def append(self, content: Mapping[str, Any]) -> None:
        """Write `content`, which has no key `hash`, as one line."""
        # A full disk or a signal may end an append half way. The next one then looks at the file again first.
        if not self._settled:
            self._settle()
        self._settled = False
        head = _link(self._head, content)
        line = (_canonical({**content, "hash": head}) + "\n").encode()
        if self._file.write(line) != len(line):
            raise OSError(f"{self._path}: only a part of a record was written; is the disk full?")
        if time.monotonic() - self._synced_at >= self._sync_seconds:
            self.sync()
        self._head = head
        self._settled = True

    def sync(self) -> None:
        """All that was appended is on disk when this returns."""
        os.fsync(self._file.fileno())
        self._synced_at = time.monotonic()

    def close(self) -> None:
        """Let another process write."""
        if not self._file.closed:
            self.sync()
        self._file.close()
