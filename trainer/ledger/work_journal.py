"""Rank 0's half of the ledger: what the run did with the GPUs it held.

Every interval is wall time of rank 0 in whole milliseconds, times the ranks: one rank is one GPU, also on CPU. What is
cut from one interval is added to the next, so that ten thousand short steps do not lose ten thousand halves.
Intervals must not overlap; what none of them covers is `unattributed`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ... import __version__
from .clock import Instant
from .config import BudgetConfig
from .journal import JournalWriter
from .summary import LedgerReader
from .terms import CHARGED_BUCKETS, LEDGER_FORMAT, WORK_FILE

RECORDS_PER_SNAPSHOT = 10_000
"""Totals are saved after so many records: reading these takes a tenth of a second."""
SYNC_SECONDS = 4.0
"""A machine that loses power takes so much of the ledger with it; a process that is killed takes nothing."""


class WorkJournal:
    """One life of rank 0, inside what the launcher has opened as `attempt`.

    Work in an attempt that no launcher has opened counts as allocated from construction to its last record. Raises
    Refused while another process writes the same ledger, and where the disk has no room for the first record; later
    ones wait in memory (see `LineWriter`).
    """

    def __init__(self, run_dir: Path, *, ranks: int, attempt: str, budget: BudgetConfig) -> None:
        self.ledger = LedgerReader(run_dir)
        """Both halves of the ledger, as far as they are in their files."""
        self._journal = JournalWriter(
            run_dir / WORK_FILE, sync_seconds=SYNC_SECONDS, find_head=self.ledger.read_new_records
        )
        self._since_totals = 0
        self._attempt = attempt
        self._ranks = ranks
        self._cut_ms = 0.0
        self._left_out = 0
        self._append(
            "begin",
            format=LEDGER_FORMAT,
            version=__version__,
            ranks=ranks,
            phase=budget.phase,
            budget_gpu_hours=budget.gpu_hours,
        )
        self._journal.require_written()

    @property
    def pending_records(self) -> int:
        """Records that a full disk has not taken yet."""
        return self._journal.pending_records

    @property
    def write_error(self) -> str | None:
        """Why records wait; None where none does."""
        return self._journal.write_error

    @property
    def is_file_removed(self) -> bool:
        """Whether somebody has removed the file that this half of the ledger is written to."""
        return self._journal.is_file_removed

    def record_ready(self) -> None:
        """The first step begins now: what no interval has charged up to here was spent on the way to it."""
        self._cut_ms = 0.0
        self._append("ready")

    def record_step(self, step: int, productive_ms: float, tokens: int) -> int:
        """Optimizer step `step` (from 1) is done: it took `productive_ms` of wall time and `tokens` new tokens.

        Returns the GPU-milliseconds charged.
        """
        gpu_ms = self._gpu_ms(productive_ms)
        self._append("step", step=step, gpu_ms=gpu_ms, tokens=tokens)
        return gpu_ms

    def record_skipped_step(self, step: int, milliseconds: float, tokens: int) -> None:
        """Step `step` took so long, and was not applied: its `tokens` are consumed, not retained."""
        self._append("skipped", step=step, gpu_ms=self._gpu_ms(milliseconds), tokens=tokens)

    def record_step_time_terms(self, step: int, step_us: int, us: Mapping[str, int]) -> None:
        """Step `step` was looked at closely on all ranks together: `step_us` GPU-microseconds, and what they were of.

        `us` holds the names of `terms.TERMS`, and `bubble`, the part of pipeline_wait that an ideal run would have too.
        """
        self._append("terms", step=step, step_us=step_us, us=us)

    def record_interval(self, bucket: str, milliseconds: float) -> None:
        """Charge `milliseconds` of wall time to `bucket`, one of `terms.CHARGED_BUCKETS`."""
        if bucket not in CHARGED_BUCKETS:
            raise ValueError(f"{bucket!r} is not a bucket to charge; one of {', '.join(CHARGED_BUCKETS)}")
        self._append("interval", bucket=bucket, gpu_ms=self._gpu_ms(milliseconds))

    @contextmanager
    def charge_time(self, bucket: str) -> Iterator[None]:
        """Charge what runs inside to `bucket`, also if it fails: the time is spent either way."""
        started = Instant.now()
        try:
            yield
        finally:
            self.record_interval(bucket, Instant.now().ns_since(started) / 1e6)

    def record_resume(self, step: int) -> None:
        """The run goes on from the checkpoint of step `step`: steps done after it are rolled back.

        A life that is `ready` without it starts from initial weights.
        """
        self._append("resume", step=step)

    def record_inherited_totals(self, totals: Mapping[str, int | str]) -> None:
        """Carry `totals`, of a checkpoint that came without its ledger (see `totals.carry`)."""
        self._append("inherited", **{f"from_{key}": value for key, value in totals.items()})

    def sync(self) -> None:
        """Wait until all of it is on disk: a checkpoint is about to rely on it."""
        self._journal.sync()

    def close(self, *, clean: bool = True) -> None:
        """This life ends on purpose, or because of a fault that it has lived to see.

        What its launcher holds the GPUs for from here on is `idle`, or after a fault `restart`.
        """
        self._append("end", clean=clean)
        self._journal.sync()
        self._save_totals()
        self._journal.close()

    def _gpu_ms(self, milliseconds: float) -> int:
        if milliseconds < 0:
            raise ValueError(f"an interval cannot last {milliseconds} ms")
        whole_ms = int(milliseconds + self._cut_ms)
        self._cut_ms += milliseconds - whole_ms
        return whole_ms * self._ranks

    def _append(self, kind: str, **content: bool | int | float | str | Mapping[str, int]) -> None:
        own = {"attempt": self._attempt, **Instant.now().to_record()}
        if self._left_out and self._journal.append({"kind": "left_out", **own, "records": self._left_out}):
            self._left_out = 0
        if not self._journal.append({"kind": kind, **own, **content}):
            self._left_out += 1
        self._since_totals += 1
        if self._since_totals >= RECORDS_PER_SNAPSHOT:
            self._save_totals()

    def _save_totals(self) -> None:
        self._since_totals = 0
        self.ledger.save_snapshot()
