"""Cost of a run: allocated = productive + rolled back + buckets + unattributed, to the millisecond."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...comm.errors import ConfigError, Problem, raise_if_any
from .allocation_journal import read_heartbeat
from .journal import JournalReader
from .record_batch import stream_records
from .records import LedgerRecord
from .replay import FIRST_START_BUCKET, Attempt, AttemptState, UnopenedAttemptError
from .retained_steps import LedgerOutOfOrder
from .snapshot import (
    LedgerSnapshot,
    is_small_ledger,
    read_snapshot,
    refuse_snapshot_mismatch,
    snapshot_problem,
    write_snapshot,
)
from .terms import (
    ALLOCATION_FILE,
    LEDGER_BUCKETS,
    PUBLISHED_GPU_HOURS,
    PUBLISHED_GPU_HOURS_PER_TRILLION_TOKENS,
    PUBLISHED_TOTAL_GPU_HOURS,
    STEP_TIME_TERMS,
    WORK_FILE,
    to_gpu_hours,
    to_paper_terms,
)

TRAILING_STEPS = 100


@dataclass(frozen=True)
class AttemptUsage:
    """GPU time of one attempt, as a scheduler would account for it."""

    attempt: str
    job: str | None
    """Scheduler's job ID."""
    ranks: int
    """GPUs at the end of the attempt."""
    milliseconds: int
    gpu_ms: int


@dataclass(frozen=True, kw_only=True)
class LedgerSummary:
    """Cost of a run up to the last record or heartbeat in its ledger. Times are in GPU-milliseconds."""

    phase: str
    budget_gpu_hours: float
    """Budget of the run in its last attempt."""
    attempt_usages: Sequence[AttemptUsage]
    """Attempts, in order."""
    segments: int
    """Number of periods with one number of GPUs, over all attempts."""
    is_running: bool
    """True if the last attempt has not released its GPUs: it is running, or its launcher was killed."""
    allocated_ms: int
    """GPU time held by the attempts in this directory."""
    gpu_ms_by_phase: Mapping[str, int]
    """Allocated time by the phase of each attempt."""
    productive_ms: int
    """Time of kept steps."""
    rolled_back_ms: int
    """Time of steps that a crash has undone."""
    gpu_ms_by_bucket: Mapping[str, int]
    """Time by the buckets of `terms.LEDGER_BUCKETS`."""
    unattributed_ms: int
    """Allocated time that no record covers."""
    gpu_ms_by_term: Mapping[str, int]
    """Productive time by `terms.STEP_TIME_TERMS` and `other`, scaled from the sampled steps; empty without any."""
    bubble_ms: int
    """Pipeline wait of the program with every duration at its mean: derived, not measured."""
    sampled_steps: int
    """Number of sampled steps."""
    inherited_ms: int
    """Cost of the checkpoint that this run started from, if it came without its ledger."""
    inherited_head: str | None
    """Hash of the last record of the checkpoint's ledger."""
    steps_retained: int
    tokens_consumed: int
    """Tokens of all steps done, including inherited ones."""
    tokens_retained: int
    """Tokens of kept steps, including inherited ones."""
    tokens_by_phase: Mapping[str, int]
    """Tokens of kept steps of this directory, by phase."""
    step_ms_per_token: float | None
    """GPU-milliseconds per token, median of the last steps; None before the first."""
    head: str
    """Hash of the last record of the work journal; a checkpoint carries it."""
    allocation_head: str
    """Hash of the last record of the allocation journal."""
    num_records: int
    """Records of the work journal."""

    @property
    def num_attempts(self) -> int:
        """Number of attempts."""
        return len(self.attempt_usages)

    @property
    def total_ms(self) -> int:
        """Allocated plus inherited time."""
        return self.allocated_ms + self.inherited_ms

    @property
    def gpu_hours(self) -> float:
        """Total cost: allocated plus inherited."""
        return to_gpu_hours(self.total_ms)

    @property
    def gpu_hours_per_trillion_tokens(self) -> float | None:
        """Total cost per trillion retained tokens; None before the first step."""
        return self.gpu_hours / self.tokens_retained * 1e12 if self.tokens_retained else None

    @property
    def budget_share(self) -> float:
        """Total cost divided by the run's budget."""
        return self.gpu_hours / self.budget_gpu_hours

    @property
    def goodput(self) -> float:
        """Share of allocated time spent on kept steps."""
        return self.productive_ms / self.allocated_ms if self.allocated_ms else 0.0

    @property
    def telemetry_share(self) -> float:
        """Logging time of rank 0 divided by the time of all steps done."""
        return self.gpu_ms_by_bucket["telemetry"] / max(1, self.productive_ms + self.rolled_back_ms)

    @property
    def gpu_ms_by_paper_term(self) -> Mapping[str, int]:
        """Productive time by `terms.to_paper_terms`; empty without sampled steps."""
        return to_paper_terms(self.gpu_ms_by_term, self.bubble_ms) if self.gpu_ms_by_term else {}

    def checkpoint_totals(self) -> dict[str, int | str]:
        """Return the totals for a checkpoint, by which a resume checks its ledger (see `carry_checkpoint_totals`)."""
        return {
            "gpu_ms": self.total_ms,
            "tokens_consumed": self.tokens_consumed,
            "tokens_retained": self.tokens_retained,
            "head": self.head,
            "allocation_head": self.allocation_head,
        }

    def to_json(self) -> dict[str, object]:
        """Return fields and derived figures as plain values."""
        return {
            "phase": self.phase,
            "attempts": self.num_attempts,
            "segments": self.segments,
            "running": self.is_running,
            "gpu_ms": {
                "allocated": self.allocated_ms,
                "productive": self.productive_ms,
                "rolled_back": self.rolled_back_ms,
                **self.gpu_ms_by_bucket,
                "unattributed": self.unattributed_ms,
                "inherited": self.inherited_ms,
            },
            "phase_gpu_ms": dict(self.gpu_ms_by_phase),
            "terms_gpu_ms": dict(self.gpu_ms_by_term),
            "report_gpu_ms": dict(self.gpu_ms_by_paper_term),
            "sampled_steps": self.sampled_steps,
            "goodput": self.goodput,
            "telemetry_share": self.telemetry_share,
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


def summarize_ledger(run_dir: Path) -> LedgerSummary:
    """Read the ledger of `run_dir`, also of a live run. Raises `ConfigError` like `LedgerReader.summarize`."""
    return LedgerReader(run_dir).summarize()


def summarize_verified_ledger(run_dir: Path) -> LedgerSummary:
    """Read every record of the ledger and check its snapshot. Raises `ConfigError` if they differ."""
    reader = LedgerReader(run_dir, from_snapshot=False)
    reader.verify_snapshot()
    return reader.summarize()


def ensure_snapshot(run_dir: Path) -> None:
    """Write a snapshot of a long ledger that has no valid one, so that later readers need not read all of it.

    Called by the launcher that holds the run directory. Raises `ConfigError` like `LedgerReader.summarize`.
    """
    with suppress(OSError):
        if not is_small_ledger(run_dir) and read_snapshot(run_dir) is None:
            LedgerReader(run_dir, from_snapshot=False).save_snapshot()


class LedgerReader:
    """Incremental reader of the ledger of `run_dir`, which starts from a valid snapshot (see `snapshot.py`)."""

    def __init__(self, run_dir: Path, *, from_snapshot: bool = True) -> None:
        self._run_dir = run_dir
        self._begin(read_snapshot(run_dir) if from_snapshot else None)

    def _begin(self, snapshot: LedgerSnapshot | None) -> None:
        start = LedgerSnapshot() if snapshot is None else snapshot
        self._allocation = JournalReader(self._run_dir / ALLOCATION_FILE, start.allocation)
        self._work = JournalReader(self._run_dir / WORK_FILE, start.work)
        self._ledger = start.ledger

    def read_new_records(self) -> str:
        """Read new records; return the hash of the last work record. Raises `ConfigError` like `summarize`."""
        try:
            self._read()
        except LedgerOutOfOrder:
            self._begin(None)
            self._read()
        return self._work.position.head

    def _read(self, until: LedgerSnapshot | None = None) -> None:
        # Size first: the openings of all work up to here are then already in the allocation journal.
        opened, end = None, self._work.file_size()
        if until is not None:
            opened, end = until.allocation.position, until.work.position
        records = itertools.chain(stream_records(self._allocation, opened), stream_records(self._work, end))
        try:
            self._ledger.replay(records)
        except UnopenedAttemptError as error:
            hint = f"has a record of attempt {str(error)!r}, which no record opens; restore the ledger's files"
            raise ConfigError([Problem("RUN", str(self._run_dir), hint)]) from error

    def save_snapshot(self) -> None:
        """Write a snapshot of the ledger so far; a full disk keeps the previous one."""
        self.read_new_records()
        write_snapshot(self._run_dir, self._snapshot())

    def verify_snapshot(self) -> None:
        """Read everything from the beginning and compare it with the snapshot at its position.

        Raises `ConfigError` like `summarize`, and for a snapshot that is damaged or differs from the records.
        """
        self._begin(None)
        for file in (ALLOCATION_FILE, WORK_FILE):
            # Another format is refused as such, whatever its totals look like.
            next(stream_records(JournalReader(self._run_dir / file), 1), None)
        problem = snapshot_problem(self._run_dir)
        raise_if_any([] if problem is None else [problem])
        saved = read_snapshot(self._run_dir, 0)
        if saved is not None:
            self._read(saved)
            refuse_snapshot_mismatch(self._run_dir, saved, self._snapshot())
        self.read_new_records()

    def _snapshot(self) -> LedgerSnapshot:
        return LedgerSnapshot(self._allocation.position, self._work.position, self._ledger)

    def summarize(self) -> LedgerSummary:
        """Return the summary as of now.

        Raises `ConfigError` without a ledger, for another version, a broken chain, and intervals that overlap.
        """
        self.read_new_records()
        attempts, tally = self._ledger.attempts, self._ledger.tally
        if not attempts:
            raise ConfigError([Problem("RUN", str(self._run_dir), "holds no ledger; name the directory of a run")])
        held, spent = _attempt_usages(attempts, read_heartbeat(self._run_dir))
        by_phase: Counter[str] = Counter()
        for attempt, launch in zip(attempts, held, strict=True):
            by_phase[attempt.phase] += launch.gpu_ms
        retained = tally.retained
        self._refuse_overlap(spent)
        return LedgerSummary(
            phase=attempts[-1].phase,
            budget_gpu_hours=attempts[-1].budget_gpu_hours,
            attempt_usages=held,
            segments=sum(attempt.segments for attempt in attempts),
            is_running=not attempts[-1].closed,
            allocated_ms=sum(launch.gpu_ms for launch in held),
            gpu_ms_by_phase=by_phase,
            productive_ms=retained.gpu_ms,
            rolled_back_ms=tally.rolled_back_ms,
            gpu_ms_by_bucket={bucket: spent[bucket] for bucket in LEDGER_BUCKETS},
            unattributed_ms=spent["unattributed"],
            gpu_ms_by_term=_in_proportion(retained.gpu_ms, tally.terms_us, tally.sampled_us),
            bubble_ms=retained.gpu_ms * tally.terms_us["bubble"] // max(1, tally.sampled_us),
            sampled_steps=tally.sampled_steps,
            inherited_ms=tally.inherited_ms,
            inherited_head=tally.inherited_head,
            steps_retained=retained.count,
            tokens_consumed=tally.tokens_consumed + tally.inherited_consumed,
            tokens_retained=retained.tokens.total() + tally.inherited_retained,
            tokens_by_phase=+retained.tokens,
            step_ms_per_token=_median(retained.recent_ms_per_token(TRAILING_STEPS)),
            head=self._work.position.head,
            allocation_head=self._allocation.position.head,
            num_records=self._work.position.number,
        )

    def _refuse_overlap(self, spent: Mapping[str, int]) -> None:
        problems = [
            Problem(f"{self._run_dir}/ledger, {bucket.replace('_', ' ')}", gpu_ms, "GPU-ms: charged intervals overlap")
            for bucket, gpu_ms in spent.items()
            if gpu_ms < 0
        ]
        if problems:
            raise ConfigError(problems)


def _attempt_usages(
    attempts: Sequence[Attempt], heartbeat: LedgerRecord | None
) -> tuple[list[AttemptUsage], Counter[str]]:
    """Return the GPU time of each attempt, and the total GPU-milliseconds by bucket."""
    held: list[AttemptUsage] = []
    total: Counter[str] = Counter(unattributed=0)
    after_crash = False
    for attempt in attempts:
        last_heartbeat = heartbeat if heartbeat is not None and heartbeat.attempt == attempt.name else None
        is_over = attempt.closed or attempt is not attempts[-1]
        lasted_ms, gpu_ms, spent = attempt.compute_usage(is_over=is_over, last_heartbeat=last_heartbeat)
        held.append(AttemptUsage(attempt.name, attempt.job, attempt.ranks, lasted_ms, gpu_ms))
        spent["restart" if after_crash else "initialization"] += spent.pop(FIRST_START_BUCKET, 0)
        total.update(spent)
        after_crash = attempt.state is not AttemptState.ENDED
    return held, total


def _in_proportion(total: int, weights: Mapping[str, int], whole: int) -> dict[str, int]:
    """Split `total` in proportion to `weights` of `whole`; the rest is `other`. The parts add up exactly."""
    if not whole:
        return {}
    parts = {term: total * weights[term] // whole for term in STEP_TIME_TERMS}
    return parts | {"other": total - sum(parts.values())}


def _median(rates: Sequence[float]) -> float | None:
    return sorted(rates)[len(rates) // 2] if rates else None
