"""Append-only, hash-chained, fsynced lines: a record that was written stays written, and an edited one is noticed.

Each line is one JSON object. Its `hash` is SHA-256 over the hash of the line before and the canonical JSON of the rest.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...comm.refusal import Problem, Refused
from ..telemetry.lines import cut_torn_line, whole_lines

GENESIS = "0" * 64
"""What the first line is chained to."""


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The records of the journal at `path`, each with its `hash`; none when there is no such file.

    A last line without newline is still being written, or was torn by a crash, and is left out. Raises Refused, naming
    the line, where the chain is broken.
    """
    return list(_records(path)) if path.exists() else []


def _records(path: Path) -> Iterator[dict[str, Any]]:
    head = GENESIS
    for number, line in whole_lines(path):
        record = _parse(line)
        content = {key: value for key, value in record.items() if key != "hash"}
        if record.get("hash") != (head := _link(head, content)):
            remedy = "the chain of hashes is broken: this line or one before it was changed; restore the file"
            raise Refused([Problem(f"{path}:{number}", line[:80], remedy)])
        yield record


def _parse(line: str) -> dict[str, Any]:
    """The object on `line`, or an empty one, which no chain contains."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return record if isinstance(record, dict) else {}


def _link(head: str, content: Mapping[str, Any]) -> str:
    return hashlib.sha256((head + _canonical(content)).encode()).hexdigest()


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


class Journal:
    """The one writer of a journal. Raises Refused when the chain is broken or another writer holds the file.

    Not for several threads at once: the owner locks.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
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
        records = read_journal(self._path)
        self._head = records[-1]["hash"] if records else GENESIS
        self._settled = True

    def append(self, content: Mapping[str, Any]) -> None:
        """Write `content`, which has no key `hash`, as one line; it is on disk when this returns."""
        # A full disk or a signal may end an append half way. The next one then looks at the file again first.
        if not self._settled:
            self._settle()
        self._settled = False
        head = _link(self._head, content)
        line = (_canonical({**content, "hash": head}) + "\n").encode()
        if self._file.write(line) != len(line):
            raise OSError(f"{self._path}: only a part of a record was written; is the disk full?")
        os.fsync(self._file.fileno())
        self._head = head
        self._settled = True

    def close(self) -> None:
        """Let another process write."""
        self._file.close()
