"""Snapshot of a ledger's totals, from which a reader continues with the newer records.

A ledger of a million records takes seconds to read. The snapshot names the last record that it includes of both
journals, by position and hash. If that record is missing, or the snapshot is damaged, everything is read. The hash
does not show whether earlier records were changed later; `shoestring budget --verify` reads all of them.
"""

import hashlib
import json
import os
from array import array
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...comm.errors import ConfigError, Problem
from ...comm.files.file_io import read_json
from ...comm.files.strict_json import MalformedFileError
from .journal import JournalPosition, is_valid_position
from .replay import Ledger
from .retained_steps import RetainedSteps
from .terms import ALLOCATION_FILE, SNAPSHOT_FILE, WORK_FILE

SNAPSHOT_MIN_BYTES = 4 * 2**20
"""Work journals below this size (15,000 records) are always read whole, which takes a fifth of a second."""
_FORMAT = 3
_MOST_BYTES = 2**26


@dataclass(frozen=True)
class LedgerSnapshot:
    """Replayed ledger and the positions up to which its journals were read."""

    allocation: JournalPosition = field(default_factory=JournalPosition)
    work: JournalPosition = field(default_factory=JournalPosition)
    ledger: Ledger = field(default_factory=Ledger)
    format: int = _FORMAT


def read_snapshot(run_dir: Path, min_bytes: int | None = None) -> LedgerSnapshot | None:
    """Return the snapshot of `run_dir`; None if there is none that belongs to its ledger.

    None also for a ledger of less than `min_bytes`, by default `SNAPSHOT_MIN_BYTES` (see `is_small_ledger`).
    """
    try:
        saved = None if is_small_ledger(run_dir, min_bytes) else _read_undamaged(run_dir)
    except OSError:
        return None
    return saved if saved is not None and _missing_record(run_dir, saved) is None else None


def snapshot_problem(run_dir: Path) -> Problem | None:
    """Return the problem of the snapshot of `run_dir`, or of the ledger that it was made from.

    None if there is no snapshot, or if its last records are in the ledger (see also `refuse_snapshot_mismatch`).
    """
    path = run_dir / SNAPSHOT_FILE
    if not path.exists():
        return None
    saved = _read_undamaged(run_dir)
    if saved is None:
        return Problem(
            str(path), "saved totals", "are damaged or of another version; delete this file, and it is written again"
        )
    lost = _missing_record(run_dir, saved)
    if lost is None:
        return None
    file, place = lost
    words = f"are counted by {path} but not all in the journal: records are lost or changed, so the cost is too small"
    hint = f"{words}; restore the file, or delete {path} to count only the records that are left"
    return Problem(str(file), f"{place.number} records", hint)


def _read_undamaged(run_dir: Path) -> LedgerSnapshot | None:
    """Return the snapshot of `run_dir`; None if there is none, or it is damaged or of another version."""
    try:
        saved = read_json(run_dir / SNAPSHOT_FILE, _MOST_BYTES)
        totals = saved["totals"]
        if saved["sha256"].as_string() != _digest(totals.value):
            return None
        totals.require_format("saved totals", _FORMAT)
        return totals.as_dataclass(LedgerSnapshot)
    except (OSError, MalformedFileError):
        return None


def _missing_record(run_dir: Path, saved: LedgerSnapshot) -> tuple[Path, JournalPosition] | None:
    """Return the first journal without the last record that `saved` counts, and that record's position."""
    places = {run_dir / ALLOCATION_FILE: saved.allocation, run_dir / WORK_FILE: saved.work}
    return next(((file, place) for file, place in places.items() if not is_valid_position(file, place)), None)


def is_small_ledger(run_dir: Path, min_bytes: int | None = None) -> bool:
    """Return True if the ledger of `run_dir` is always read whole. Raises `OSError` without a ledger."""
    return (run_dir / WORK_FILE).stat().st_size < (SNAPSHOT_MIN_BYTES if min_bytes is None else min_bytes)


def write_snapshot(run_dir: Path, snapshot: LedgerSnapshot) -> None:
    """Write a snapshot; a full disk keeps the previous one."""
    # Not synced: after a power failure a damaged snapshot is detected and ignored.
    text = f'{{"sha256":"{_digest(snapshot)}","totals":{_canonical(snapshot)}}}\n'
    path = run_dir / SNAPSHOT_FILE
    new = path.with_name(f"{path.name}.{os.getpid()}")
    with suppress(OSError):
        try:
            new.write_text(text)
            new.replace(path)
        except OSError:
            new.unlink(missing_ok=True)


def refuse_snapshot_mismatch(run_dir: Path, saved: LedgerSnapshot, found: LedgerSnapshot) -> None:
    """Raise `ConfigError` if the snapshot `saved` in `run_dir` differs from the totals `found` in all records."""
    if found != saved:
        hint = "differ from the ledger's records; delete this file, and it is written again"
        raise ConfigError([Problem(str(run_dir / SNAPSHOT_FILE), "saved totals", hint)])


def _digest(totals: Any) -> str:
    return hashlib.sha256(_canonical(totals).encode()).hexdigest()


def _canonical(totals: Any) -> str:
    return json.dumps(totals, sort_keys=True, separators=(",", ":"), default=_to_plain)


def _to_plain(value: Any) -> Any:
    """Return a dataclass or a column of numbers as JSON can hold it."""
    if isinstance(value, array):
        return value.tolist()
    return vars(value.without_early_steps() if isinstance(value, RetainedSteps) else value)
