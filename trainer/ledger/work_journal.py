"""Rank 0's half of the ledger: use of the GPUs that the run held.

Every interval is wall time of rank 0 in whole milliseconds, times the ranks: one rank is one GPU, also on CPU. The
remainder of one interval is added to the next, so that ten thousand short steps do not lose ten thousand halves.
Intervals must not overlap; time that none of them covers is `unattributed`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ... import __version__
from .clock import Instant
from .config import BudgetConfig
from .journal import JournalWriter
from .records import (
    IntervalCharged,
    LedgerRecord,
    Rank0Ended,
    Rank0Started,
    RecordsLeftOut,
    Resumed,
    StepDone,
    StepSkipped,
    StepTimed,
    TotalsInherited,
    TrainingReady,
    record_now,
)
from .summary import LedgerReader
from .terms import CHARGED_BUCKETS, WORK_FILE

RECORDS_PER_SNAPSHOT = 10_000
"""Records between snapshots: reading that many takes a tenth of a second."""
SYNC_SECONDS = 4.0
"""Longest part of the ledger that a power failure may lose; a killed process loses nothing."""


class WorkJournal:
    """Work journal of one process of rank 0, within the launcher's `attempt`.

    Work in an attempt that no launcher has opened counts as allocated from construction to its last record. Raises
    `ConfigError` while another process writes the ledger, and if the disk has no space for the first record; later ones
    wait in memory (see `LineWriter`).
    """

    def __init__(self, run_dir: Path, *, ranks: int, attempt: str, budget: BudgetConfig) -> None:
        self.ledger = LedgerReader(run_dir)
        """Reader of both halves of the ledger, as far as they are in their files."""
        self._journal = JournalWriter(
            run_dir / WORK_FILE, sync_seconds=SYNC_SECONDS, find_head=self.ledger.read_new_records
        )
        self._since_snapshot = 0
        self._attempt = attempt
        self._ranks = ranks
        self._remainder_ms = 0.0
        self._dropped = 0
        own = {"ranks": ranks, "phase": budget.phase, "budget_gpu_hours": budget.gpu_hours}
        self._append(Rank0Started, version=__version__, **own)
        self._journal.require_written()

    @property
    def pending_records(self) -> int:
        """Number of records that a full disk has not taken yet."""
        return self._journal.pending_records

    @property
    def write_error(self) -> str | None:
        """Reason why records are not in the file; None if all are."""
        return self._journal.write_error

    @property
    def is_file_removed(self) -> bool:
        """True if the journal's file was deleted."""
        return self._journal.is_file_removed

    def record_ready(self) -> None:
        """Record that the first step begins; uncharged time before it is `initialization` or `restart`."""
        self._remainder_ms = 0.0
        self._append(TrainingReady)

    def record_step(self, step: int, productive_ms: float, tokens: int) -> int:
        """Record step `step` (from 1) with its wall time and new tokens; return the GPU-milliseconds charged."""
        gpu_ms = self._gpu_ms(productive_ms)
        self._append(StepDone, step=step, gpu_ms=gpu_ms, tokens=tokens)
        return gpu_ms

    def record_skipped_step(self, step: int, milliseconds: float, tokens: int) -> None:
        """Record a step that was not applied: its `tokens` are consumed, not retained."""
        self._append(StepSkipped, step=step, gpu_ms=self._gpu_ms(milliseconds), tokens=tokens)

    def record_step_time_terms(self, step: int, step_us: int, us: Mapping[str, int]) -> None:
        """Record a sampled step of `step_us` GPU-microseconds over all ranks.

        `us` maps `terms.STEP_TIME_TERMS` and `bubble`, the pipeline wait of the ideal program, to GPU-microseconds.
        """
        self._append(StepTimed, step=step, step_us=step_us, us=us)

    def record_interval(self, bucket: str, milliseconds: float) -> None:
        """Charge `milliseconds` of wall time to `bucket`, one of `terms.CHARGED_BUCKETS`."""
        if bucket not in CHARGED_BUCKETS:
            raise ValueError(f"{bucket!r} is not a bucket to charge; one of {', '.join(CHARGED_BUCKETS)}")
        self._append(IntervalCharged, bucket=bucket, gpu_ms=self._gpu_ms(milliseconds))

    @contextmanager
    def charge_time(self, bucket: str) -> Iterator[None]:
        """Charge the time inside to `bucket`, also if it ends with an error."""
        started = Instant.now()
        try:
            yield
        finally:
            self.record_interval(bucket, Instant.now().ns_since(started) / 1e6)

    def record_resume(self, step: int) -> None:
        """Record a resume from the checkpoint of step `step`: later steps are rolled back.

        An attempt that is `ready` without a resume starts from initial weights.
        """
        self._append(Resumed, step=step)

    def record_inherited_totals(self, totals: Mapping[str, int | str]) -> None:
        """Record the `totals` of a checkpoint that came without its ledger (see `carry_checkpoint_totals`)."""
        self._append(TotalsInherited, **{f"from_{key}": value for key, value in totals.items()})

    def sync(self) -> None:
        """Wait until all records are on disk: a checkpoint will refer to them."""
        self._journal.sync()

    def close(self, *, clean: bool = True) -> None:
        """Record the end of this process; `clean` is False after a fault.

        Time that the launcher holds the GPUs afterwards is `idle`, or `restart` after a fault.
        """
        self._append(Rank0Ended, clean=clean)
        self._journal.sync()
        self._save_snapshot()
        self._journal.close()

    def _gpu_ms(self, milliseconds: float) -> int:
        if milliseconds < 0:
            raise ValueError(f"an interval cannot last {milliseconds} ms")
        whole_ms = int(milliseconds + self._remainder_ms)
        self._remainder_ms += milliseconds - whole_ms
        return whole_ms * self._ranks

    def _append(self, cls: Callable[..., LedgerRecord], **fields: Any) -> None:
        left_out = self._dropped
        if left_out and self._journal.append(record_now(RecordsLeftOut, self._attempt, records=left_out)):
            self._dropped = 0
        if not self._journal.append(record_now(cls, self._attempt, **fields)):
            self._dropped += 1
        self._since_snapshot += 1
        if self._since_snapshot >= RECORDS_PER_SNAPSHOT:
            self._save_snapshot()

    def _save_snapshot(self) -> None:
        self._since_snapshot = 0
        self.ledger.save_snapshot()
