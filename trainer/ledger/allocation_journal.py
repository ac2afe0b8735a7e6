"""Launcher's half of the ledger: which GPUs the run holds, from when to when.

The launcher writes it, because imports, restarts and crashes happen outside the lifetime of the ranks.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path

from ... import __version__
from ...comm.files.file_io import read_json, replace_file_atomically
from ...comm.files.strict_json import MAX_INTEGER, MalformedFileError
from .clock import Instant
from .config import BudgetConfig
from .journal import JournalWriter, Record
from .records import read_checked_records
from .terms import ALLOCATION_FILE, HEARTBEAT_FILE, LEDGER_FORMAT

HEARTBEAT_SECONDS = 2.0
"""Interval of heartbeats; the ledger misses at most this much of a killed launcher's time."""
_HEARTBEAT_BYTES = 10_000


class AllocationJournal:
    """One attempt: `ranks` GPUs held under the name `attempt`, from construction to `close`.

    A daemon thread writes a heartbeat every `heartbeat_seconds`; a killed launcher has held its GPUs up to the last
    heartbeat, or up to rank 0's last record if that is later. `job` is the scheduler's job ID. Raises `ConfigError`
    while another launcher holds the run directory, and for a full disk.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        ranks: int,
        attempt: str,
        budget: BudgetConfig,
        job: str | None = None,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ) -> None:
        self._journal = JournalWriter(run_dir / ALLOCATION_FILE)
        self._heartbeat_path = run_dir / HEARTBEAT_FILE
        earlier = read_checked_records(run_dir / ALLOCATION_FILE)
        if any(record["attempt"] == attempt for record in earlier):
            raise ValueError(f"attempt {attempt!r} is in the ledger already: each launch needs another name")
        self._close_killed_attempt(earlier, read_heartbeat(run_dir))
        self._attempt = attempt
        self._heartbeat_seconds = heartbeat_seconds
        self._closing = threading.Event()
        held = {} if job is None else {"job": job}
        self._append(
            "open",
            format=LEDGER_FORMAT,
            version=__version__,
            ranks=ranks,
            phase=budget.phase,
            budget_gpu_hours=budget.gpu_hours,
            **held,
        )
        self._journal.require_written()
        self.write_heartbeat()
        self._thread = threading.Thread(target=self._run_heartbeat, name="ledger heartbeat", daemon=True)
        self._thread.start()

    def _close_killed_attempt(self, earlier: list[Record], heartbeat: Record | None) -> None:
        """Append the last heartbeat of a killed launcher to the chain as its `close` record."""
        is_open = bool(earlier) and earlier[-1]["kind"] == "open"
        if heartbeat is not None and is_open and heartbeat["attempt"] == earlier[-1]["attempt"]:
            self._journal.append({"kind": "close", **heartbeat, "reason": "its launcher was killed"})

    def _run_heartbeat(self) -> None:
        while not self._closing.wait(self._heartbeat_seconds):
            self.write_heartbeat()

    def write_heartbeat(self) -> None:
        """Write the current instant to `heartbeat.json`, a separate file: the chain holds only events."""
        try:
            replace_file_atomically(
                self._heartbeat_path, json.dumps({"attempt": self._attempt, **Instant.now().to_record()}).encode()
            )
        except OSError:
            return  # a full disk may have space for the next one

    def close(self, reason: str) -> None:
        """Record that the GPUs are released; `reason` is text for a reader of the file."""
        self._closing.set()
        self._thread.join()
        self._append("close", reason=reason)
        self._journal.close()

    def _append(self, kind: str, **content: int | float | str) -> None:
        self._journal.append({"kind": kind, "attempt": self._attempt, **Instant.now().to_record(), **content})


def read_heartbeat(run_dir: Path) -> Record | None:
    """Return the last heartbeat (attempt and instant), or None if it cannot be read."""
    try:
        heartbeat = read_json(run_dir / HEARTBEAT_FILE, _HEARTBEAT_BYTES)
        times = {key: heartbeat[key].as_integer(-MAX_INTEGER) for key in ("wall_ns", "monotonic_ns")}
        return {"attempt": heartbeat["attempt"].as_string(), **times, "boot": heartbeat["boot"].as_string()}
    except (OSError, MalformedFileError):
        return None
