"""Running cost of a run, cheap enough to read at every step."""

from __future__ import annotations

from .clock import Instant
from .summary import LedgerSummary
from .terms import to_gpu_hours


class CostMeter:
    """Cost meter: the ledger's totals at the start of this attempt, plus the elapsed time of all ranks.

    `summary` is read after `carry_checkpoint_totals`.
    """

    def __init__(self, summary: LedgerSummary, *, ranks: int) -> None:
        self._start = Instant.now()
        self._before_ms = summary.total_ms
        self._phase_before_ms = summary.gpu_ms_by_phase[summary.phase]
        self._productive_ms = summary.productive_ms
        self._allocated_ms = summary.allocated_ms
        self._ranks = ranks

    def add_step(self, gpu_ms: int) -> None:
        """Add the cost of a finished step."""
        self._productive_ms += gpu_ms

    def gpu_hours(self) -> float:
        """Return the GPU-hours from the first attempt until now, including inherited ones."""
        return to_gpu_hours(self._before_ms + self._elapsed_ms())

    def phase_gpu_hours(self) -> float:
        """Return the GPU-hours of this run's attempts in the current phase."""
        return to_gpu_hours(self._phase_before_ms + self._elapsed_ms())

    def goodput(self) -> float:
        """Return the share of allocated time that was spent on kept steps."""
        return self._productive_ms / max(1, self._allocated_ms + self._elapsed_ms())

    def _elapsed_ms(self) -> int:
        return Instant.now().ns_since(self._start) // 1_000_000 * self._ranks
