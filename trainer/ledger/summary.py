"""What a run has cost: allocated = productive + rolled back + buckets + unattributed, to the millisecond."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...comm.errors import ConfigError, Problem, raise_if_any
from .allocation_journal import read_heartbeat
from .clock import Instant
from .journal import JournalReader, Record
from .records import check_record
from .replay import FIRST_START_BUCKET, Attempt, AttemptOpenedLate, AttemptState
from .retained_steps import StepNoLongerKept
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
    """One launch, as a scheduler would account for it."""

    attempt: str
    job: str | None
    """The scheduler's name of what held the GPUs."""
    ranks: int
    """GPUs at its end."""
    milliseconds: int
    gpu_ms: int


@dataclass(frozen=True, kw_only=True)
class LedgerSummary:
    """The cost of a run up to the last sign of life in its ledger. Times are in GPU-milliseconds."""

    phase: str
    budget_gpu_hours: float
    """The run's own budget, as its last launch was told."""
    attempt_usages: Sequence[AttemptUsage]
    """Launches, in order."""
    segments: int
    """Stretches of a launch with one number of GPUs."""
    is_running: bool
    """The last launch has not given its GPUs back: it is alive, or its launcher was killed."""
    allocated_ms: int
    """GPUs held by the launches in this directory."""
    gpu_ms_by_phase: Mapping[str, int]
    """The same by the phase that each launch was in."""
    productive_ms: int
    """Of steps that the weights hold."""
    rolled_back_ms: int
    """Of steps that a crash has undone."""
    gpu_ms_by_bucket: Mapping[str, int]
    """The names of `terms.LEDGER_BUCKETS`."""
    unattributed_ms: int
    """Allocated, and charged to nothing."""
    gpu_ms_by_term: Mapping[str, int]
    """Productive time by `terms.STEP_TIME_TERMS` and `other`, in proportion to the steps looked at; empty if there is none."""
    bubble_ms: int
    """The part of pipeline_wait that the program would have with every duration at its mean: derived, not measured."""
    sampled_steps: int
    """Steps that `terms` is known from."""
    inherited_ms: int
    """What the checkpoint had cost that this run started from, when it came without its ledger."""
    inherited_head: str | None
    """The last record of the ledger that it came from."""
    steps_retained: int
    tokens_consumed: int
    """Inherited ones included, like those below."""
    tokens_retained: int
    """Tokens of steps that the weights hold."""
    tokens_by_phase: Mapping[str, int]
    """Retained by steps of this directory."""
    step_ms_per_token: float | None
    """GPU-milliseconds a token, the median of the last steps; None before the first."""
    head: str
    """Hash of the last record of the work journal; a checkpoint carries it."""
    allocation_head: str
    """The same of the launcher's journal."""
    num_records: int
    """Of work, up to its head."""

    @property
    def num_attempts(self) -> int:
        """Launches."""
        return len(self.attempt_usages)

    @property
    def total_ms(self) -> int:
        """Allocated here and inherited."""
        return self.allocated_ms + self.inherited_ms

    @property
    def gpu_hours(self) -> float:
        """The cost: allocated here and inherited."""
        return to_gpu_hours(self.total_ms)

    @property
    def gpu_hours_per_trillion_tokens(self) -> float | None:
        """The cost over the retained tokens; None before the first step."""
        return self.gpu_hours / self.tokens_retained * 1e12 if self.tokens_retained else None

    @property
    def budget_share(self) -> float:
        """The cost over the run's own budget, 1.0 being all of it."""
        return self.gpu_hours / self.budget_gpu_hours

    @property
    def goodput(self) -> float:
        """The share of what was allocated that is in the weights."""
        return self.productive_ms / self.allocated_ms if self.allocated_ms else 0.0

    @property
    def telemetry_share(self) -> float:
        """Time that rank 0 has spent on telling, over that of all steps done."""
        return self.gpu_ms_by_bucket["telemetry"] / max(1, self.productive_ms + self.rolled_back_ms)

    @property
    def gpu_ms_by_paper_term(self) -> Mapping[str, int]:
        """See `terms.to_paper_terms`; empty where no step was looked at."""
        return to_paper_terms(self.gpu_ms_by_term, self.bubble_ms) if self.gpu_ms_by_term else {}

    def checkpoint_totals(self) -> dict[str, int | str]:
        """What a checkpoint carries, so that a resume can see that its ledger came along (see `totals.carry`)."""
        return {
            "gpu_ms": self.total_ms,
            "tokens_consumed": self.tokens_consumed,
            "tokens_retained": self.tokens_retained,
            "head": self.head,
            "allocation_head": self.allocation_head,
        }

    def to_json(self) -> dict[str, object]:
        """Plain values for a script: the fields, and what follows from them."""
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
    """Read the ledger of `run_dir`, also of a live run. Raises `ConfigError` as `LedgerReader.summarize_ledger` does."""
    return LedgerReader(run_dir).summarize()


def summarize_verified_ledger(run_dir: Path) -> LedgerSummary:
    """The same from every record; the totals that are saved must agree, else raises `ConfigError`."""
    reader = LedgerReader(run_dir, from_snapshot=False)
    reader.verify_snapshot()
    return reader.summarize()


def ensure_snapshot(run_dir: Path) -> None:
    """Save totals beside a long ledger that has none which fit, so that only this reader reads all of it.

    For the launcher that holds the run directory. Raises `ConfigError` as `LedgerReader.summarize_ledger` does.
    """
    with suppress(OSError):
        if not is_small_ledger(run_dir) and read_snapshot(run_dir) is None:
            LedgerReader(run_dir, from_snapshot=False).save_snapshot()


class LedgerReader:
    """Reads the ledger of `run_dir`, and from the second time on only what is new.

    It begins with the totals that a run saves beside its ledger, where there are some that fit (see `snapshot.py`).
    """

    def __init__(self, run_dir: Path, *, from_snapshot: bool = True) -> None:
        self._run_dir = run_dir
        self._begin(read_snapshot(run_dir) if from_snapshot else None)

    def _begin(self, snapshot: LedgerSnapshot | None) -> None:
        start = LedgerSnapshot() if snapshot is None else snapshot
        self._allocation = JournalReader(self._run_dir / ALLOCATION_FILE, start.allocation, check=check_record)
        self._work = JournalReader(self._run_dir / WORK_FILE, start.work, check=check_record)
        self._ledger = start.ledger

    def read_new_records(self) -> str:
        """Read what is new; return the hash of the last record of work. Raises `ConfigError` as `summary` does."""
        try:
            self._read()
        except (StepNoLongerKept, AttemptOpenedLate):
            self._begin(None)
            self._read()
        return self._work.head

    def _read(self, until: LedgerSnapshot | None = None) -> None:
        end = self._work.file_size()  # first: what opened the work up to here is then in the other journal already
        opened = None
        if until is not None:
            opened, end = until.allocation.position, until.work.position
        try:
            self._ledger.replay_records(self._allocation.stream_records(opened), self._work.stream_batches(end))
        except KeyError as error:
            hint = f"has a record of launch {error}, which no record opens; restore the ledger's files"
            raise ConfigError([Problem("run", str(self._run_dir), hint)]) from error

    def save_snapshot(self) -> None:
        """Save the totals up to here beside the ledger, for the next reader; a disk that is full keeps the old ones."""
        self.read_new_records()
        write_snapshot(self._run_dir, self._snapshot())

    def verify_snapshot(self) -> None:
        """Read everything from the beginning, and compare it with the saved totals at their place.

        Raises `ConfigError` as `summary` does, where the records contradict the totals, and where the totals
        are damaged or count records that are not there.
        """
        self._begin(None)
        for journal in (self._allocation, self._work):
            journal.check_first_record()  # another format is refused as such, whatever its totals look like
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
        """As of now.

        Raises `ConfigError` without a ledger, for another version, a broken chain, and intervals that overlap.
        """
        self.read_new_records()
        attempts, tally, latest = list(self._ledger.attempts.values()), self._ledger.tally, self._ledger.latest_opening
        if latest is None:
            raise ConfigError([Problem("run", str(self._run_dir), "holds no ledger; name the directory of a run")])
        held, spent = _outcomes(attempts, read_heartbeat(self._run_dir))
        by_phase: Counter[str] = Counter()
        for attempt, launch in zip(attempts, held, strict=True):
            by_phase[attempt.phase] += launch.gpu_ms
        retained = tally.retained
        self._refuse_overlap(spent)
        return LedgerSummary(
            phase=latest["phase"],
            budget_gpu_hours=latest["budget_gpu_hours"],
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
            steps_retained=len(retained),
            tokens_consumed=tally.tokens_consumed + tally.inherited_consumed,
            tokens_retained=retained.tokens.total() + tally.inherited_retained,
            tokens_by_phase=+retained.tokens,
            step_ms_per_token=_median(retained.recent_ms_per_token(TRAILING_STEPS)),
            head=self._work.head,
            allocation_head=self._allocation.head,
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


def _outcomes(attempts: Sequence[Attempt], heartbeat: Record | None) -> tuple[list[AttemptUsage], Counter[str]]:
    """What each launch held, and where all their time went that is not of steps."""
    held: list[AttemptUsage] = []
    total: Counter[str] = Counter(unattributed=0)
    after_death = False
    for attempt in attempts:
        is_heard = heartbeat is not None and heartbeat["attempt"] == attempt.name
        heard = Instant.from_record(heartbeat) if heartbeat is not None and is_heard else None
        is_over = attempt.closed or attempt is not attempts[-1]
        lasted_ms, gpu_ms, spent = attempt.compute_usage(is_over=is_over, last_heartbeat=heard)
        held.append(AttemptUsage(attempt.name, attempt.job, attempt.ranks, lasted_ms, gpu_ms))
        spent["restart" if after_death else "initialization"] += spent.pop(FIRST_START_BUCKET, 0)
        total.update(spent)
        after_death = attempt.state is not AttemptState.ENDED
    return held, total


def _in_proportion(total: int, weights: Mapping[str, int], whole: int) -> dict[str, int]:
    """`total` split like `weights` split `whole`; what they leave is `other`. The parts add up exactly."""
    if not whole:
        return {}
    parts = {term: total * weights[term] // whole for term in STEP_TIME_TERMS}
    return parts | {"other": total - sum(parts.values())}


def _median(rates: Sequence[float]) -> float | None:
    return sorted(rates)[len(rates) // 2] if rates else None
