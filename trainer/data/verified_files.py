"""`.verified.json` next to the data: files that were verified, with their size and modification time."""

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
    """Return the hash, size and modification time that a verified file must still have."""
    return [entry.sha256, status and status.st_size, status and status.st_mtime_ns]


def read_file_signature(directory: Path, entry: FileEntry) -> list[object]:
    """Return the current signature of a file of `directory`."""
    path = directory / entry.file
    return file_signature(entry, path.stat() if path.is_file() else None)


def read_verified_files(directory: Path) -> Mapping[str, object]:
    """Return the signatures of verified files by name; empty if `.verified.json` cannot be read."""
    try:
        return read_json(directory / VERIFIED_FILE).as_mapping()
    except (OSError, MalformedFileError):
        return {}


def write_verified_files(directory: Path, stamp: Mapping[str, object]) -> None:
    """Write `.verified.json`; in a read-only directory nothing is written, and every launch reads the data again."""
    with contextlib.suppress(OSError):
        replace_file_atomically(directory / VERIFIED_FILE, (json.dumps(stamp, indent=1) + "\n").encode())
