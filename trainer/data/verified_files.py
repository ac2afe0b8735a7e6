"""A note beside the data of which files were found whole, and what they looked like from outside then."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from ...comm.files.file_io import read_json, replace_file_atomically
from ...comm.files.strict_json import MalformedFileError
from .manifest import FileEntry

VERIFIED_FILE = ".verified.json"


def file_signature(entry: FileEntry, status: os.stat_result | None) -> list[object]:
    """Return what a file must still be for its stamp to hold: its digest, its size and its time of change."""
    return [entry.sha256, status and status.st_size, status and status.st_mtime_ns]


def read_file_signature(directory: Path, entry: FileEntry) -> list[object]:
    """Return the mark of a file of `directory`, as it is now."""
    path = directory / entry.file
    return file_signature(entry, path.stat() if path.is_file() else None)


def read_verified_files(directory: Path) -> Mapping[str, object]:
    """Return the mark of each file that was found whole, by name; none where there is no stamp to be read."""
    try:
        return read_json(directory / VERIFIED_FILE).as_mapping()
    except (OSError, MalformedFileError):
        return {}


def write_verified_files(directory: Path, stamp: Mapping[str, object]) -> None:
    """Write the stamp where the directory may be written; elsewhere every launch reads again."""
    with contextlib.suppress(OSError):
        replace_file_atomically(directory / VERIFIED_FILE, (json.dumps(stamp, indent=1) + "\n").encode())
