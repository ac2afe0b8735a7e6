"""What a run has cost: allocated = productive + rolled back + buckets + unknown, to the millisecond."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...comm.refusal import Problem, Refused
from .journal import GENESIS, read_journal
from .replay import check_identity, segments, tally
from .terms import (
    ALLOCATION_FILE,
    BUCKETS,
    PUBLISHED_GPU_HOURS,
    PUBLISHED_GPU_HOURS_PER_TRILLION_TOKENS,
    PUBLISHED_TOTAL_GPU_HOURS,
    WORK_FILE,
    gpu_hours,
)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The cost of a run up to the last sign of life in its ledger. Times are in GPU-milliseconds."""

    phase: str
    budget_gpu_hours: float
    """The run's own budget, as its last launch was told."""
    attempts: int
    """Launches."""
    running: bool
    """The last launch has not given its GPUs back: it is alive, or its launcher was killed."""
    allocated_ms: int
    """GPUs held by the launches in this directory."""
    productive_ms: int
    """Of steps that the weights hold."""
    rolled_back_ms: int
    """Of steps that a crash has undone."""
    buckets: Mapping[str, int]
    """The names of `terms.BUCKETS`, and `idle`: held after the run was done."""
    inherited_ms: int
    """What the checkpoint had cost that this run started from, when it came without its ledger."""
    steps_retained: int
    tokens_consumed: int
    """Inherited ones included, like those below."""
    tokens_retained: int
    """Tokens of steps that the weights hold."""
    head: str
    """Hash of the last record of the work journal; a checkpoint carries it."""

    @property
    def unknown_ms(self) -> int:
        """Allocated, and charged to nothing."""
        return self.allocated_ms - self.productive_ms - self.rolled_back_ms - sum(self.buckets.values())

    @property
    def total_ms(self) -> int:
        """Allocated here and inherited."""
        return self.allocated_ms + self.inherited_ms

    @property
    def gpu_hours(self) -> float:
        """The cost: allocated here and inherited."""
        return gpu_hours(self.total_ms)

    @property
    def gpu_hours_per_trillion_tokens(self) -> float | None:
        """The cost over the retained tokens; None before the first step."""
        return self.gpu_hours / self.tokens_retained * 1e12 if self.tokens_retained else None

    @property
    def budget_share(self) -> float:
        """The cost over the run's own budget, 1.0 being all of it."""
        return self.gpu_hours / self.budget_gpu_hours

    def totals(self) -> dict[str, int | str]:
        """What a checkpoint carries, so that a resume can see that its ledger came along (see `totals.carry`)."""
        return {
            "gpu_ms": self.total_ms,
            "tokens_consumed": self.tokens_consumed,
            "tokens_retained": self.tokens_retained,
            "head": self.head,
        }

    def to_json(self) -> dict[str, object]:
        """Plain values for a script: the fields, and what follows from them."""
        return {
            "phase": self.phase,
            "attempts": self.attempts,
            "running": self.running,
            "gpu_ms": {
                "allocated": self.allocated_ms,
                "productive": self.productive_ms,
                "rolled_back": self.rolled_back_ms,
                **self.buckets,
                "unknown": self.unknown_ms,
                "inherited": self.inherited_ms,
            },
            "steps_retained": self.steps_retained,
            "tokens_consumed": self.tokens_consumed,
            "tokens_retained": self.tokens_retained,
            "gpu_hours": self.gpu_hours,
            "gpu_hours_per_trillion_tokens": self.gpu_hours_per_trillion_tokens,
            "published_gpu_hours_per_trillion_tokens": PUBLISHED_GPU_HOURS_PER_TRILLION_TOKENS,
            "budget_gpu_hours": self.budget_gpu_hours,
            "budget_share": self.budget_share,
            "published_phase_share": self.gpu_hours / PUBLISHED_GPU_HOURS[self.phase],
            "published_total_share": self.gpu_hours / PUBLISHED_TOTAL_GPU_HOURS,
        }


def summarise(run_dir: Path) -> Summary:
    """Read the ledger of `run_dir`, also while the run is alive.

    Raises Refused when there is no ledger, when a chain is broken, and when more was charged than allocated.
    """
    allocation, work = read_journal(run_dir / ALLOCATION_FILE), read_journal(run_dir / WORK_FILE)
    openings = [record for record in (*allocation, *work) if record["kind"] in ("open", "begin")]
    if not openings:
        raise Refused([Problem("run", str(run_dir), "holds no ledger; name the directory of a run")])
    latest = max(openings, key=lambda record: int(record["wall_ns"]))
    held, charged = segments(allocation, work), tally(work)
    check_identity(run_dir, held, charged)
    return Summary(
        phase=latest["phase"],
        budget_gpu_hours=latest["budget_gpu_hours"],
        attempts=len(held),
        running=not held[-1].closed,
        allocated_ms=sum(segment.gpu_ms for segment in held),
        productive_ms=sum(record["gpu_ms"] for record in charged.retained),
        rolled_back_ms=charged.rolled_back_ms,
        buckets={
            **{bucket: charged.buckets[bucket] for bucket in BUCKETS},
            "idle": sum(segment.idle_ms * segment.ranks for segment in held),
        },
        inherited_ms=charged.inherited_ms,
        steps_retained=len(charged.retained),
        tokens_consumed=charged.tokens_consumed + charged.inherited_consumed,
        tokens_retained=sum(record["tokens"] for record in charged.retained) + charged.inherited_retained,
        head=work[-1]["hash"] if work else GENESIS,
    )
