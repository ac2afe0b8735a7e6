"""The launcher's half of the ledger: which GPUs the run holds, from when to when.

The launcher writes it, not the ranks: importing, restarting and dying all happen before, between and after ranks.
"""

from __future__ import annotations

import threading
from pathlib import Path

from .clock import Instant
from .config import BudgetConfig
from .journal import Journal, read_journal
from .terms import ALLOCATION_FILE


class Allocation:
    """One segment: `ranks` GPUs held under the name `attempt`, from construction to `close`.

    A daemon thread writes a heartbeat every `beat_seconds`; a launcher that is killed has held its GPUs up to the last
    one, or up to the last record of rank 0 if that is later. Raises Refused while another launcher holds the run
    directory.
    """

    def __init__(
        self, run_dir: Path, *, ranks: int, attempt: str, budget: BudgetConfig, beat_seconds: float = 10.0
    ) -> None:
        self._journal = Journal(run_dir / ALLOCATION_FILE)
        if any(record["attempt"] == attempt for record in read_journal(run_dir / ALLOCATION_FILE)):
            raise ValueError(f"attempt {attempt!r} is in the ledger already: each launch needs a name of its own")
        self._attempt = attempt
        self._beat_seconds = beat_seconds
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._append("open", ranks=ranks, phase=budget.phase, budget_gpu_hours=budget.gpu_hours)
        self._thread = threading.Thread(target=self._beat, name="ledger heartbeat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._closing.wait(self._beat_seconds):
            self.heartbeat()

    def heartbeat(self) -> None:
        """Record that the GPUs are still held."""
        self._append("heartbeat")

    def close(self, reason: str) -> None:
        """End the segment: the GPUs are given back. `reason` is for the reader of the file."""
        self._closing.set()
        self._thread.join()
        self._append("close", reason=reason)
        self._journal.close()

    def _append(self, kind: str, **content: int | float | str) -> None:
        with self._lock:
            self._journal.append({"kind": kind, "attempt": self._attempt, **Instant.now().stamp(), **content})
