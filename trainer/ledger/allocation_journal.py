"""The launcher's half of the ledger: which GPUs the run holds, from when to when.

The launcher writes it, not the ranks: importing, restarting and dying all happen before, between and after ranks.
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
"""A killed launcher's last so many seconds are all that the ledger does not see."""
_HEARTBEAT_BYTES = 10_000


class AllocationJournal:
    """One launch: `ranks` GPUs held under the name `attempt`, from construction to `close`.

    A daemon thread leaves a sign of life every `beat_seconds`; a launcher that is killed has held its GPUs up to the
    last one, or up to the last record of rank 0 if that is later. `job` is the scheduler's name of what holds the GPUs.
    Raises `ConfigError` while another launcher holds the run directory, and where the disk has no room for the opening.
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
        former = read_checked_records(run_dir / ALLOCATION_FILE)
        if any(record["attempt"] == attempt for record in former):
            raise ValueError(f"attempt {attempt!r} is in the ledger already: each launch needs a name of its own")
        self._close_former(former, read_heartbeat(run_dir))
        self._attempt = attempt
        self._beat_seconds = heartbeat_seconds
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
        self._thread = threading.Thread(target=self._beat, name="ledger heartbeat", daemon=True)
        self._thread.start()

    def _close_former(self, former: list[Record], heartbeat: Record | None) -> None:
        """A launcher that was killed could not say so: what its heartbeat says enters the chain now."""
        is_open = bool(former) and former[-1]["kind"] == "open"
        if heartbeat is not None and is_open and heartbeat["attempt"] == former[-1]["attempt"]:
            self._journal.append({"kind": "close", **heartbeat, "reason": "its launcher was killed"})

    def _beat(self) -> None:
        while not self._closing.wait(self._beat_seconds):
            self.write_heartbeat()

    def write_heartbeat(self) -> None:
        """Say that the GPUs are still held: in a file of its own, so that the chain keeps to what happened."""
        try:
            replace_file_atomically(
                self._heartbeat_path, json.dumps({"attempt": self._attempt, **Instant.now().to_record()}).encode()
            )
        except OSError:
            return  # a full disk may have room again for the next one

    def close(self, reason: str) -> None:
        """The GPUs are given back. `reason` is for the reader of the file."""
        self._closing.set()
        self._thread.join()
        self._append("close", reason=reason)
        self._journal.close()

    def _append(self, kind: str, **content: int | float | str) -> None:
        self._journal.append({"kind": kind, "attempt": self._attempt, **Instant.now().to_record(), **content})


def read_heartbeat(run_dir: Path) -> Record | None:
    """The last launcher's last sign of life, an attempt and an instant; None where there is none to be read."""
    try:
        heartbeat = read_json(run_dir / HEARTBEAT_FILE, _HEARTBEAT_BYTES)
        times = {key: heartbeat[key].as_integer(-MAX_INTEGER) for key in ("wall_ns", "monotonic_ns")}
        return {"attempt": heartbeat["attempt"].as_string(), **times, "boot": heartbeat["boot"].as_string()}
    except (OSError, MalformedFileError):
        return None
