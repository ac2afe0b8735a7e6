"""What a run has cost: allocated = productive + rolled back + buckets + unknown, to the millisecond."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...comm.errors import ConfigError, Problem, refuse_if_any
from .allocation import read_heartbeat
from .clock import Instant
from .journal import JournalReader, Record
from .records import check_record
from .replay import FIRST_START, Attempt, LateOpening, LaunchState
from .retained import Forgotten
from .snapshot import Snapshot, is_cheap, read_snapshot, refuse_different, totals_problem, write_snapshot
from .terms import (
    ALLOCATION_FILE,
    BUCKETS,
    PUBLISHED_GPU_HOURS,
    PUBLISHED_GPU_HOURS_PER_TRILLION_TOKENS,
    PUBLISHED_TOTAL_GPU_HOURS,
    TERMS,
    WORK_FILE,
    gpu_hours,
    report_view,
)

TRAILING_STEPS = 100


@dataclass(frozen=True)
class LaunchUsage:
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
    held: Sequence[LaunchUsage]
    """Launches, in order."""
    segments: int
    """Stretches of a launch with one number of GPUs."""
    running: bool
    """The last launch has not given its GPUs back: it is alive, or its launcher was killed."""
    allocated_ms: int
    """GPUs held by the launches in this directory."""
    by_phase: Mapping[str, int]
    """The same by the phase that each launch was in."""
    productive_ms: int
    """Of steps that the weights hold."""
    rolled_back_ms: int
    """Of steps that a crash has undone."""
    buckets: Mapping[str, int]
    """The names of `terms.BUCKETS`."""
    unknown_ms: int
    """Allocated, and charged to nothing."""
    terms: Mapping[str, int]
    """Productive time by `terms.TERMS` and `other`, in proportion to the steps looked at; empty if there is none."""
    bubble_ms: int
    """The part of edge_wait that the program would have with every duration at its mean: derived, not measured."""
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
    records: int
    """Of work, up to its head."""

    @property
    def attempts(self) -> int:
        """Launches."""
        return len(self.held)

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

    @property
    def goodput(self) -> float:
        """The share of what was allocated that is in the weights."""
        return self.productive_ms / self.allocated_ms if self.allocated_ms else 0.0

    @property
    def telemetry_share(self) -> float:
        """Time that rank 0 has spent on telling, over that of all steps done."""
        return self.buckets["telemetry"] / max(1, self.productive_ms + self.rolled_back_ms)

    @property
    def report_view(self) -> Mapping[str, int]:
        """See `terms.report_view`; empty where no step was looked at."""
        return report_view(self.terms, self.bubble_ms) if self.terms else {}

    def totals(self) -> dict[str, int | str]:
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
            "attempts": self.attempts,
            "segments": self.segments,
            "running": self.running,
            "gpu_ms": {
                "allocated": self.allocated_ms,
                "productive": self.productive_ms,
                "rolled_back": self.rolled_back_ms,
                **self.buckets,
                "unknown": self.unknown_ms,
                "inherited": self.inherited_ms,
            },
            "phase_gpu_ms": dict(self.by_phase),
            "terms_gpu_ms": dict(self.terms),
            "report_gpu_ms": dict(self.report_view),
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


def summarize(run_dir: Path) -> LedgerSummary:
    """Read the ledger of `run_dir`, also of a live run. Raises `ConfigError` as `LedgerReader.summary` does."""
    return LedgerReader(run_dir).summary()


def verified_summary(run_dir: Path) -> LedgerSummary:
    """The same from every record; the totals that are saved must agree, else raises `ConfigError`."""
    reader = LedgerReader(run_dir, from_totals=False)
    reader.verify()
    return reader.summary()


def ensure_totals(run_dir: Path) -> None:
    """Save totals beside a long ledger that has none which fit, so that only this reader reads all of it.

    For the launcher that holds the run directory. Raises `ConfigError` as `LedgerReader.summary` does.
    """
    with suppress(OSError):
        if not is_cheap(run_dir) and read_snapshot(run_dir) is None:
            LedgerReader(run_dir, from_totals=False).save()


class LedgerReader:
    """Reads the ledger of `run_dir`, and from the second time on only what is new.

    It begins with the totals that a run saves beside its ledger, where there are some that fit (see `snapshot.py`).
    """

    def __init__(self, run_dir: Path, *, from_totals: bool = True) -> None:
        self._run_dir = run_dir
        self._begin(read_snapshot(run_dir) if from_totals else None)

    def _begin(self, snapshot: Snapshot | None) -> None:
        start = Snapshot() if snapshot is None else snapshot
        self._allocation = JournalReader(self._run_dir / ALLOCATION_FILE, start.allocation, check=check_record)
        self._work = JournalReader(self._run_dir / WORK_FILE, start.work, check=check_record)
        self._ledger = start.ledger

    def read(self) -> str:
        """Read what is new; return the hash of the last record of work. Raises `ConfigError` as `summary` does."""
        try:
            self._read()
        except (Forgotten, LateOpening):
            self._begin(None)
            self._read()
        return self._work.head

    def _read(self, until: Snapshot | None = None) -> None:
        end = self._work.size()  # first: what opened the work up to here is then in the other journal already
        opened = None
        if until is not None:
            opened, end = until.allocation.position, until.work.position
        try:
            self._ledger.replay(self._allocation.stream(opened), self._work.batches(end))
        except KeyError as error:
            hint = f"has a record of launch {error}, which no record opens; restore the ledger's files"
            raise ConfigError([Problem("run", str(self._run_dir), hint)]) from error

    def save(self) -> None:
        """Save the totals up to here beside the ledger, for the next reader; a disk that is full keeps the old ones."""
        self.read()
        write_snapshot(self._run_dir, self._snapshot())

    def verify(self) -> None:
        """Read everything from the beginning, and compare it with the saved totals at their place.

        Raises `ConfigError` as `summary` does, where the records contradict the totals, and where the totals
        are damaged or count records that are not there.
        """
        self._begin(None)
        problem = totals_problem(self._run_dir)
        refuse_if_any([] if problem is None else [problem])
        saved = read_snapshot(self._run_dir, 0)
        if saved is not None:
            self._read(saved)
            refuse_different(self._run_dir, saved, self._snapshot())
        self.read()

    def _snapshot(self) -> Snapshot:
        return Snapshot(self._allocation.place, self._work.place, self._ledger)

    def summary(self) -> LedgerSummary:
        """As of now.

        Raises `ConfigError` without a ledger, for another version, a broken chain, and intervals that overlap.
        """
        self.read()
        attempts, tally, latest = list(self._ledger.attempts.values()), self._ledger.tally, self._ledger.latest
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
            held=held,
            segments=sum(attempt.segments for attempt in attempts),
            running=not attempts[-1].closed,
            allocated_ms=sum(launch.gpu_ms for launch in held),
            by_phase=by_phase,
            productive_ms=retained.gpu_ms,
            rolled_back_ms=tally.rolled_back_ms,
            buckets={bucket: spent[bucket] for bucket in BUCKETS},
            unknown_ms=spent["unknown"],
            terms=_in_proportion(retained.gpu_ms, tally.terms_us, tally.sampled_us),
            bubble_ms=retained.gpu_ms * tally.terms_us["bubble"] // max(1, tally.sampled_us),
            sampled_steps=tally.sampled_steps,
            inherited_ms=tally.inherited_ms,
            inherited_head=tally.inherited_head,
            steps_retained=len(retained),
            tokens_consumed=tally.tokens_consumed + tally.inherited_consumed,
            tokens_retained=retained.tokens.total() + tally.inherited_retained,
            tokens_by_phase=+retained.tokens,
            step_ms_per_token=_median(retained.rates(TRAILING_STEPS)),
            head=self._work.head,
            allocation_head=self._allocation.head,
            records=self._work.place.number,
        )

    def _refuse_overlap(self, spent: Mapping[str, int]) -> None:
        problems = [
            Problem(f"{self._run_dir}/ledger, {bucket.replace('_', ' ')}", gpu_ms, "GPU-ms: charged intervals overlap")
            for bucket, gpu_ms in spent.items()
            if gpu_ms < 0
        ]
        if problems:
            raise ConfigError(problems)


def _outcomes(attempts: Sequence[Attempt], heartbeat: Record | None) -> tuple[list[LaunchUsage], Counter[str]]:
    """What each launch held, and where all their time went that is not of steps."""
    held: list[LaunchUsage] = []
    total: Counter[str] = Counter(unknown=0)
    after_death = False
    for attempt in attempts:
        is_heard = heartbeat is not None and heartbeat["attempt"] == attempt.name
        heard = Instant.of(heartbeat) if heartbeat is not None and is_heard else None
        is_over = attempt.closed or attempt is not attempts[-1]
        lasted_ms, gpu_ms, spent = attempt.outcome(over=is_over, heard=heard)
        held.append(LaunchUsage(attempt.name, attempt.job, attempt.ranks, lasted_ms, gpu_ms))
        spent["recovery" if after_death else "initialization"] += spent.pop(FIRST_START, 0)
        total.update(spent)
        after_death = attempt.state is not LaunchState.ENDED
    return held, total


def _in_proportion(total: int, weights: Mapping[str, int], whole: int) -> dict[str, int]:
    """`total` split like `weights` split `whole`; what they leave is `other`. The parts add up exactly."""
    if not whole:
        return {}
    parts = {term: total * weights[term] // whole for term in TERMS}
    return parts | {"other": total - sum(parts.values())}


def _median(rates: Sequence[float]) -> float | None:
    return sorted(rates)[len(rates) // 2] if rates else None
