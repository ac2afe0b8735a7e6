"""Launcher's half of the ledger: which GPUs the run holds, from when to when.

The launcher writes it, because imports, restarts and crashes happen outside the lifetime of the ranks.
"""

import json
import threading
from contextlib import suppress
from pathlib import Path

from ... import __version__
from ...comm.files.file_io import read_json, replace_file_atomically
from ...comm.files.strict_json import MalformedFileError
from .clock import Instant
from .config import BudgetConfig
from .journal import JournalReader, JournalWriter
from .record_batch import RecordBatch, stream_records
from .records import AttemptClosed, AttemptOpened, LedgerRecord, record_now, to_content
from .terms import ALLOCATION_FILE, HEARTBEAT_FILE

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
        earlier = list(stream_records(JournalReader(run_dir / ALLOCATION_FILE)))
        if any(record.attempt == attempt for record in earlier):
            raise ValueError(f"attempt {attempt!r} is in the ledger already: each launch needs another name")
        if earlier:
            self._close_killed_attempt(earlier[-1], read_heartbeat(run_dir))
        self._attempt = attempt
        self._heartbeat_seconds = heartbeat_seconds
        self._closing = threading.Event()
        own = {"ranks": ranks, "phase": budget.phase, "budget_gpu_hours": budget.gpu_hours, "job": job}
        self._journal.append(record_now(AttemptOpened, attempt, version=__version__, **own))
        self._journal.require_written()
        self.write_heartbeat()
        self._thread = threading.Thread(target=self._run_heartbeat, name="ledger heartbeat", daemon=True)
        self._thread.start()

    def _close_killed_attempt(self, last: LedgerRecord | RecordBatch, heartbeat: LedgerRecord | None) -> None:
        """Append the last heartbeat of a killed launcher, whose last record is `last`, to the chain as its close."""
        if heartbeat is not None and isinstance(last, AttemptOpened) and heartbeat.attempt == last.attempt:
            self._journal.append(to_content(AttemptClosed(**vars(heartbeat), reason="its launcher was killed")))

    def _run_heartbeat(self) -> None:
        while not self._closing.wait(self._heartbeat_seconds):
            self.write_heartbeat()

    def write_heartbeat(self) -> None:
        """Write the current instant to `heartbeat.json`, a separate file: the chain holds only events."""
        heartbeat = {"attempt": self._attempt, **vars(Instant.now())}
        with suppress(OSError):  # a full disk may have space for the next one
            replace_file_atomically(self._heartbeat_path, json.dumps(heartbeat).encode())

    def close(self, reason: str) -> None:
        """Record that the GPUs are released; `reason` is text for a reader of the file."""
        self._closing.set()
        self._thread.join()
        self._journal.append(record_now(AttemptClosed, self._attempt, reason=reason))
        self._journal.close()


def read_heartbeat(run_dir: Path) -> LedgerRecord | None:
    """Return the last heartbeat, or None if it cannot be read."""
    try:
        heartbeat = read_json(run_dir / HEARTBEAT_FILE, _HEARTBEAT_BYTES)
        return heartbeat.as_dataclass(LedgerRecord, ignore_unknown_keys=True)
    except (OSError, MalformedFileError):
        return None
