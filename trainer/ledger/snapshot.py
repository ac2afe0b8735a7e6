"""The totals of a ledger, saved beside it: a reader begins there and reads what has come since.

A ledger of a million records takes seconds to read. What is saved names the last record of both journals that it
holds, by place and hash. Where that record is not there, or the file is not as it was written, the totals count for
nothing and everything is read. A hash stands for all records before it, as they were when they were read; whether they
are still the same is found by reading all of them: `shoestring budget --verify`.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...comm.errors import ConfigError, Problem
from ...comm.files.file_io import read_json
from ...comm.files.strict_json import JsonValue
from .journal import JournalPosition, is_valid_position
from .replay import Ledger
from .terms import ALLOCATION_FILE, SNAPSHOT_FILE, WORK_FILE

SNAPSHOT_MIN_BYTES = 4 * 2**20
"""A journal of work up to this size, 15,000 records, is read whole each time: that takes a fifth of a second."""
_FORMAT = 2
_MOST_BYTES = 2**26


@dataclass(frozen=True)
class LedgerSnapshot:
    """A replayed ledger, and up to where its journals were read."""

    allocation: JournalPosition = field(default_factory=JournalPosition)
    work: JournalPosition = field(default_factory=JournalPosition)
    ledger: Ledger = field(default_factory=Ledger)


def read_snapshot(run_dir: Path, least_bytes: int | None = None) -> LedgerSnapshot | None:
    """Return the totals that are saved in `run_dir`; None where there are none, or none that belong to its ledger.

    None also for a ledger of less than `least_bytes`, by default `SNAPSHOT_MIN_BYTES` (see `is_small_ledger`).
    """
    try:
        saved = None if is_small_ledger(run_dir, least_bytes) else _as_written(run_dir)
    except OSError:
        return None
    return saved if saved is not None and _lost(run_dir, saved) is None else None


def snapshot_problem(run_dir: Path) -> Problem | None:
    """Return what is wrong with the saved totals of `run_dir`, or with the ledger that they were made from.

    None where there are none, and where their last records are in the ledger: then all up to there may still be read
    (see `refuse_snapshot_mismatch`).
    """
    path = run_dir / SNAPSHOT_FILE
    if not path.exists():
        return None
    saved = _as_written(run_dir)
    if saved is None:
        return Problem(
            str(path), "saved totals", "are not as they were written; remove this file, and it is made again"
        )
    lost = _lost(run_dir, saved)
    if lost is None:
        return None
    file, place = lost
    words = f"are not all in it, and {path} counts them: records are lost or changed, so the bill is too small"
    hint = f"{words}; restore the file, or remove {path} to have what is left count"
    return Problem(str(file), f"{place.number} records", hint)


def _as_written(run_dir: Path) -> LedgerSnapshot | None:
    """The totals that are saved in `run_dir`; None where there are none, or others than were written."""
    try:
        saved = read_json(run_dir / SNAPSHOT_FILE, _MOST_BYTES).as_mapping()
        totals = saved["totals"]
        if saved["sha256"] != _digest(totals) or totals["format"] != _FORMAT:
            return None
        places = (
            JsonValue(totals["allocation"]).as_dataclass(JournalPosition),
            JsonValue(totals["work"]).as_dataclass(JournalPosition),
        )
        return LedgerSnapshot(*places, Ledger.from_tree(totals["ledger"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def _lost(run_dir: Path, saved: LedgerSnapshot) -> tuple[Path, JournalPosition] | None:
    """The first journal that does not hold the last record that `saved` counts, and that record's place."""
    places = {run_dir / ALLOCATION_FILE: saved.allocation, run_dir / WORK_FILE: saved.work}
    return next(((file, place) for file, place in places.items() if not is_valid_position(file, place)), None)


def is_small_ledger(run_dir: Path, least_bytes: int | None = None) -> bool:
    """Whether the ledger of `run_dir` is read whole each time. Raises `OSError` where there is none."""
    return (run_dir / WORK_FILE).stat().st_size < (SNAPSHOT_MIN_BYTES if least_bytes is None else least_bytes)


def write_snapshot(run_dir: Path, snapshot: LedgerSnapshot) -> None:
    """Save totals; a disk that does not take them keeps the former ones.

    They are not synced: what a machine that loses power leaves of them counts for nothing.
    """
    places = {"allocation": asdict(snapshot.allocation), "work": asdict(snapshot.work)}
    totals = {"format": _FORMAT, **places, "ledger": snapshot.ledger.to_tree()}
    path = run_dir / SNAPSHOT_FILE
    new = path.with_name(f"{path.name}.{os.getpid()}")
    with suppress(OSError):
        try:
            new.write_text(json.dumps({"sha256": _digest(totals), "totals": totals}) + "\n")
            new.replace(path)
        except OSError:
            new.unlink(missing_ok=True)


def refuse_snapshot_mismatch(run_dir: Path, saved: LedgerSnapshot, found: LedgerSnapshot) -> None:
    """Raise `ConfigError` where totals `saved` in `run_dir` differ from what reading all records has `found`."""
    is_same_place = (found.allocation, found.work) == (saved.allocation, saved.work)
    if not is_same_place or found.ledger.comparable_totals() != saved.ledger.comparable_totals():
        hint = "are not what the ledger's records say; remove this file, and it is made again"
        raise ConfigError([Problem(str(run_dir / SNAPSHOT_FILE), "saved totals", hint)])


def _digest(totals: Any) -> str:
    return hashlib.sha256(json.dumps(totals, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
