"""Whether the bytes of a prepared directory are those that were written, found out before a run and at a bounded price.

* Up to 256 MiB every byte is read before every launch.
* A larger file is read once, and again when its size or its time of change is another. A stamp beside the data says
  which files were found whole; it holds their digests, so it is worth nothing to other data. Machines that share the
  directory leave this to the first one. A disk that changes a byte without touching the time of change is not caught.
* While a run goes on, each process looks at a shard again when it reads it first and after any change of its marks
  (see `shard_files.py`).
* `shoestring data inspect` always reads everything.
"""

from __future__ import annotations

from pathlib import Path

from .manifest import Manifest
from .shards import verify_files
from .stamp import mark_of, read_stamp, write_stamp

CHEAP_BYTES = 2**28


def verify_before_run(directory: Path, manifest: Manifest, *, first_machine: bool) -> None:
    """Raise `Refused` with each file of `directory` that is not what was written, as far as the rules above look."""
    if sum(entry.bytes for entry in manifest.files) <= CHEAP_BYTES:
        verify_files(directory, manifest.files)
    elif first_machine:
        stamped = read_stamp(directory)
        marks = {entry.file: mark_of(directory, entry) for entry in manifest.files}  # before the files are read
        unknown = [entry for entry in manifest.files if stamped.get(entry.file) != marks[entry.file]]
        verify_files(directory, unknown)
        if unknown:
            write_stamp(directory, marks)
