"""Rank 0's half of the ledger: what the run did with the GPUs it held.

Every interval is wall time of rank 0 in whole milliseconds, times the ranks: one rank is one GPU, also on CPU. What is
cut from one interval is added to the next, so that ten thousand short steps do not lose ten thousand halves.
Intervals must not overlap; what none of them covers is `unknown`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .clock import Instant
from .config import BudgetConfig
from .journal import Journal, read_journal
from .terms import ALLOCATION_FILE, BUCKETS, WORK_FILE


class Work:
    """One life of rank 0, inside the segment that the launcher opened as `attempt`.

    Work in an attempt that no launcher has opened counts as allocated from construction to its last record. Raises
    Refused while another process writes the same ledger.
    """

    def __init__(self, run_dir: Path, *, ranks: int, attempt: str, budget: BudgetConfig) -> None:
        self._journal = Journal(run_dir / WORK_FILE)
        self._attempt = attempt
        self._ranks = ranks
        self._charged_ms = 0.0
        self._cut_ms = 0.0
        former = [record for record in read_journal(run_dir / WORK_FILE) if record["attempt"] == attempt]
        opened = [record for record in read_journal(run_dir / ALLOCATION_FILE) if record["attempt"] == attempt]
        self._start_bucket = "recovery" if former else "initialisation"
        began = self._append("begin", ranks=ranks, phase=budget.phase, budget_gpu_hours=budget.gpu_hours)
        before = former[-1:] or opened[:1]
        self._start = Instant.of(before[0]) if before else began

    def ready(self) -> None:
        """Charge the way to the first step; call it once, right before that step.

        In the first life of an attempt: `initialisation`, from the launcher's opening. In a later one: `recovery`, from
        the last sign of the life before. Intervals that this life has charged already are left out.
        """
        elapsed_ms = Instant.now().ns_since(self._start) / 1e6
        self.interval(self._start_bucket, max(0.0, elapsed_ms - self._charged_ms))

    def step(self, step: int, productive_ms: float, tokens: int) -> None:
        """Optimizer step `step` (from 1) is done: it took `productive_ms` of wall time and `tokens` new tokens."""
        self._append("step", step=step, gpu_ms=self._gpu_ms(productive_ms), tokens=tokens)

    def interval(self, bucket: str, milliseconds: float) -> None:
        """Charge `milliseconds` of wall time to `bucket`, one of `terms.BUCKETS`."""
        if bucket not in BUCKETS:
            raise ValueError(f"{bucket!r} is not a bucket; one of {', '.join(BUCKETS)}")
        self._charged_ms += milliseconds
        self._append("interval", bucket=bucket, gpu_ms=self._gpu_ms(milliseconds))

    @contextmanager
    def timing(self, bucket: str) -> Iterator[None]:
        """Charge what runs inside to `bucket`, also if it fails: the time is spent either way."""
        started = Instant.now()
        try:
            yield
        finally:
            self.interval(bucket, Instant.now().ns_since(started) / 1e6)

    def resume(self, step: int) -> None:
        """The run goes on from the checkpoint of step `step`: steps done after it are rolled back."""
        self._append("resume", step=step)

    def inherit(self, totals: Mapping[str, int | str]) -> None:
        """Carry `totals`, of a checkpoint that came without its ledger (see `totals.carry`)."""
        self._append("inherited", **{f"from_{key}": value for key, value in totals.items()})

    def close(self) -> None:
        """This life ends on purpose; what its launcher holds the GPUs for from here on is `idle`."""
        self._append("end")
        self._journal.close()

    def _gpu_ms(self, milliseconds: float) -> int:
        if milliseconds < 0:
            raise ValueError(f"an interval cannot last {milliseconds} ms")
        whole_ms = int(milliseconds + self._cut_ms)
        self._cut_ms += milliseconds - whole_ms
        return whole_ms * self._ranks

    def _append(self, kind: str, **content: int | float | str) -> Instant:
        now = Instant.now()
        self._journal.append({"kind": kind, "attempt": self._attempt, **now.stamp(), **content})
        return now
