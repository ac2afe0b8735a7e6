"""What the run has cost so far, cheap enough to ask at every step."""

from __future__ import annotations

from .clock import Instant
from .summary import LedgerSummary
from .terms import to_gpu_hours


class CostMeter:
    """Starts from what the ledger says, then follows the clock: GPUs are held all the time.

    `summary` is of the present life, after `totals.carry`.
    """

    def __init__(self, summary: LedgerSummary, *, ranks: int) -> None:
        self._start = Instant.now()
        self._before_ms = summary.total_ms
        self._phase_before_ms = summary.gpu_ms_by_phase[summary.phase]
        self._productive_ms = summary.productive_ms
        self._allocated_ms = summary.allocated_ms
        self._ranks = ranks

    def add_step(self, gpu_ms: int) -> None:
        """A step is in the weights."""
        self._productive_ms += gpu_ms

    def gpu_hours(self) -> float:
        """GPU-hours from the first launch until now, inherited ones included."""
        return to_gpu_hours(self._before_ms + self._elapsed_ms())

    def phase_gpu_hours(self) -> float:
        """GPU-hours of this run's launches in the present phase."""
        return to_gpu_hours(self._phase_before_ms + self._elapsed_ms())

    def goodput(self) -> float:
        """The share of what the launches in this directory have held that is in the weights."""
        return self._productive_ms / max(1, self._allocated_ms + self._elapsed_ms())

    def _elapsed_ms(self) -> int:
        return Instant.now().ns_since(self._start) // 1_000_000 * self._ranks
