"""What the run has cost so far, cheap enough to ask at every step."""

from __future__ import annotations

from pathlib import Path

from .clock import Instant
from .summary import summarise
from .terms import gpu_hours


class Meter:
    """Reads the ledger once, then the clock: GPUs are held all the time. Make it after `Work` and `totals.carry`."""

    def __init__(self, run_dir: Path, *, ranks: int) -> None:
        summary = summarise(run_dir)
        self._start = Instant.now()
        self._before_ms = summary.total_ms
        self._budget_gpu_hours = summary.budget_gpu_hours
        self._ranks = ranks

    def gpu_hours(self) -> float:
        """GPU-hours from the first launch until now, inherited ones included."""
        elapsed_ms = Instant.now().ns_since(self._start) // 1_000_000
        return gpu_hours(self._before_ms + elapsed_ms * self._ranks)

    def budget_share(self) -> float:
        """The same over the run's own budget, 1.0 being all of it."""
        return self.gpu_hours() / self._budget_gpu_hours
