"""Whether the bytes of a prepared directory are those that were written, found out before a run and at a bounded price.

* Up to 256 MiB every byte is read before every launch.
* A larger file is read once, and again when its size or its time of change is another. A stamp beside the data says
  which files were found whole; it holds their digests, so it is worth nothing to other data. Machines that share the
  directory leave this to the first one. A disk that changes a byte without touching the time of change is not caught.
* `shoestring data inspect` always reads everything.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

from ...comm.files import read_json, replace_file
from ...comm.strict import Malformed
from .manifest import FileEntry, Manifest
from .shards import verify_files

STAMP = ".verified.json"
CHEAP_BYTES = 2**28


def verify_before_run(directory: Path, manifest: Manifest, *, first_machine: bool) -> None:
    """Raise `Refused` with each file of `directory` that is not what was written, as far as the rules above look."""
    if sum(entry.bytes for entry in manifest.files) <= CHEAP_BYTES:
        verify_files(directory, manifest.files)
    elif first_machine:
        stamped = _read_stamp(directory)
        unknown = [entry for entry in manifest.files if stamped.get(entry.file) != _mark(directory, entry)]
        verify_files(directory, unknown)
        if unknown:
            _write_stamp(directory, {entry.file: _mark(directory, entry) for entry in manifest.files})


def _mark(directory: Path, entry: FileEntry) -> list[object]:
    """What a file must still be for its stamp to hold."""
    path = directory / entry.file
    status = path.stat() if path.is_file() else None
    return [entry.sha256, status and status.st_size, status and status.st_mtime_ns]


def _read_stamp(directory: Path) -> Mapping[str, object]:
    try:
        return read_json(directory / STAMP).mapping()
    except (OSError, Malformed):
        return {}


def _write_stamp(directory: Path, stamp: Mapping[str, object]) -> None:
    """Where the directory may be written; elsewhere every launch reads again."""
    with contextlib.suppress(OSError):
        replace_file(directory / STAMP, (json.dumps(stamp, indent=1) + "\n").encode())
