"""Replay of the two journals: every millisecond of every allocated GPU goes to exactly one bucket or step.

Of the time between two records of rank 0, the second record charges a part; the rest goes to the bucket of the
attempt's state: starting, running, ended or failed. So the parts add up by construction.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from .clock import Instant
from .record_batch import RecordBatch
from .records import (
    AttemptClosed,
    AttemptOpened,
    ChargedRecord,
    IntervalCharged,
    LedgerRecord,
    Rank0Ended,
    Rank0Started,
    Resumed,
    StepDone,
    StepSkipped,
    StepTimed,
    TotalsInherited,
    TrainingReady,
)
from .retained_steps import Counts, LedgerOutOfOrder, RetainedSteps


class AttemptState(StrEnum):
    """State of an attempt as of its last record."""

    NOT_STARTED = "no rank 0 yet"
    STARTING = "on the way to its first step"
    RUNNING = "training"
    ENDED = "done"
    FAILED = "ended by a fault"


_State = Annotated[AttemptState, lambda item: AttemptState(item.as_word(AttemptState))]
FIRST_START_BUCKET = "first start"
"""Time before an attempt's first step: `initialization`, or `restart` if the attempt before it has crashed."""
_FREE = {
    AttemptState.NOT_STARTED: FIRST_START_BUCKET,
    AttemptState.STARTING: "restart",
    AttemptState.RUNNING: "unattributed",
    AttemptState.ENDED: "idle",
    AttemptState.FAILED: "restart",
}
"""Bucket of time that no record has charged, by state."""


@dataclass(kw_only=True)
class Attempt:
    """One attempt: the GPUs it held, and their time by bucket."""

    name: str
    phase: str
    job: str | None
    budget_gpu_hours: float
    ranks: int
    """GPUs held; a start of rank 0 with another number begins a new segment."""
    has_launcher: bool
    """False if rank 0 was started without a launcher: the attempt then ends with rank 0."""
    cursor: Instant
    """Instant of rank 0's last record, or of the opening."""
    sign: Instant | None = None
    """Last instant at which the launcher is known to have held the GPUs."""
    closed: bool = False
    """True if the launcher has released the GPUs, or a later one has found it dead."""
    state: _State = AttemptState.NOT_STARTED
    gpu_ms_by_bucket: Counts = field(default_factory=Counter)
    """GPU-milliseconds outside steps up to rank 0's last record; also `unattributed` and `FIRST_START_BUCKET`."""
    segments: int = 1
    rank0_starts: int = 0
    held_ms: int = 0
    """GPU-milliseconds up to `cursor`."""
    since_ns: int = 0
    """Nanoseconds up to `cursor`."""
    counted_ms: int = 0
    """Whole milliseconds of `since_ns`."""

    @staticmethod
    def from_opening(opening: AttemptOpened | Rank0Started) -> "Attempt":
        """Return the attempt that `opening` begins."""
        return Attempt(
            name=opening.attempt,
            phase=opening.phase,
            job=opening.job,
            budget_gpu_hours=opening.budget_gpu_hours,
            ranks=opening.ranks,
            has_launcher=isinstance(opening, AttemptOpened),
            cursor=opening.instant,
        )

    def record_sign_of_life(self, now: Instant) -> None:
        """Record that the GPUs were held at `now`."""
        if self.sign is None or now.ns_since(self.sign) > 0:
            self.sign = now

    def apply(self, record: LedgerRecord | RecordBatch) -> None:
        """Apply a record of rank 0, or a batch of them."""
        if isinstance(record, RecordBatch):
            passed_ns, self.cursor = record.first.ns_since(self.cursor) + record.elapsed_ns, record.last
        else:
            passed_ns, self.cursor = record.ns_since(self.cursor), record.instant
        free_ms = self._advance(passed_ns) * self.ranks
        if isinstance(record, RecordBatch | ChargedRecord):
            free_ms -= record.gpu_ms
        match record:
            case Rank0Started():
                self._charge_free_time(free_ms, crashed=self.state in (AttemptState.STARTING, AttemptState.RUNNING))
                self.state = AttemptState.STARTING
                self.rank0_starts += 1
                self.segments += record.ranks != self.ranks
                self.ranks, self.budget_gpu_hours = record.ranks, record.budget_gpu_hours
            case Rank0Ended():
                self._charge_free_time(free_ms, crashed=not record.clean)
                self.state = AttemptState.ENDED if record.clean else AttemptState.FAILED
                self.closed = self.closed or not self.has_launcher
            case TrainingReady():
                self._charge_free_time(free_ms)
                self.state = AttemptState.RUNNING
            case _:
                self._charge_free_time(free_ms)
        match record:
            case RecordBatch():
                self.gpu_ms_by_bucket.update(record.gpu_ms_by_bucket)
            case StepSkipped():
                self.gpu_ms_by_bucket["skipped"] += record.gpu_ms
            case IntervalCharged():
                self.gpu_ms_by_bucket[record.bucket] += record.gpu_ms

    def _advance(self, nanoseconds: int) -> int:
        """Return the whole milliseconds of `nanoseconds` more; the remainder is carried to the next call."""
        self.since_ns += nanoseconds
        passed = self.since_ns // 1_000_000 - self.counted_ms
        self.counted_ms += passed
        self.held_ms += passed * self.ranks
        return passed

    def _charge_free_time(self, gpu_ms: int, *, crashed: bool = False) -> None:
        """Charge time that no record has charged: to `hang` before a crash, else by the state."""
        self.gpu_ms_by_bucket["hang" if crashed else self._free_bucket()] += gpu_ms

    def _free_bucket(self) -> str:
        is_first_start = self.state is AttemptState.STARTING and self.rank0_starts == 1
        return FIRST_START_BUCKET if is_first_start else _FREE[self.state]

    def compute_usage(self, *, is_over: bool, last_heartbeat: Instant | None) -> tuple[int, int, Counter[str]]:
        """Return milliseconds and GPU-milliseconds up to the last heartbeat or record, and GPU-milliseconds by bucket.

        `last_heartbeat` is the launcher's. An attempt that `is_over` without a final record has crashed.
        """
        signs = (sign.ns_since(self.cursor) for sign in (self.sign, last_heartbeat) if sign is not None)
        lasted_ms = (self.since_ns + max(signs, default=0)) // 1_000_000
        tail_ms = (lasted_ms - self.counted_ms) * self.ranks
        died = is_over and self.state in (AttemptState.STARTING, AttemptState.RUNNING)
        spent = self.gpu_ms_by_bucket.copy()
        spent["hang" if died else self._free_bucket()] += tail_ms
        return lasted_ms, self.held_ms + tail_ms, spent


@dataclass
class StepTally:
    """Totals of steps in GPU-milliseconds and tokens, as of the last record replayed."""

    retained: RetainedSteps = field(default_factory=RetainedSteps)
    """Kept steps: those whose updates are in the weights."""
    rolled_back_ms: int = 0
    tokens_consumed: int = 0
    inherited_ms: int = 0
    inherited_consumed: int = 0
    inherited_retained: int = 0
    inherited_head: str | None = None
    terms_us: Counts = field(default_factory=Counter)
    """GPU-microseconds of each term, and of `bubble`, in the sampled steps."""
    sampled_us: int = 0
    """GPU-microseconds of the sampled steps."""
    sampled_steps: int = 0
    has_resumed: bool = False

    def apply(self, record: LedgerRecord | RecordBatch, phase: str) -> None:
        """Apply a record of rank 0 or a batch of them, of an attempt in `phase`."""
        match record:
            case RecordBatch():
                self._add_steps(record.steps, record.step_gpu_ms, record.step_tokens, phase)
            case StepSkipped():
                self.tokens_consumed += record.tokens
            case StepDone():
                self._add_steps([record.step], [record.gpu_ms], [record.tokens], phase)
            case Rank0Started():
                self.has_resumed = False
            case Resumed():
                self.has_resumed = True
                self._roll_back_to(record.step)
            case TrainingReady() if not self.has_resumed:
                self._roll_back_to(0)  # its weights are initial ones
            case TotalsInherited():
                self.inherited_ms += record.from_gpu_ms
                self.inherited_consumed += record.from_tokens_consumed
                self.inherited_retained += record.from_tokens_retained
                self.inherited_head = record.from_head
            case StepTimed():
                self.terms_us.update(record.us)
                self.sampled_us += record.step_us
                self.sampled_steps += 1

    def _add_steps(self, numbers: Sequence[int], gpu_ms: Sequence[int], tokens: Sequence[int], phase: str) -> None:
        self.tokens_consumed += sum(tokens)
        if self.retained.extend(numbers, gpu_ms, tokens, phase):
            return
        for number, spent_ms, count in zip(numbers, gpu_ms, tokens, strict=True):
            # A repeated step number means that the step was done again, even without a resume record.
            self._roll_back_to(number - 1)
            self.retained.extend([number], [spent_ms], [count], phase)

    def _roll_back_to(self, step: int) -> None:
        """Move the cost of the steps after `step` from productive to rolled back."""
        self.rolled_back_ms += self.retained.roll_back_to(step)


class UnopenedAttemptError(Exception):
    """A record of an attempt that no record opens."""


@dataclass
class Ledger:
    """State of both journals, as replayed so far."""

    attempts: list[Attempt] = field(default_factory=list)
    """Attempts in order of opening."""
    tally: StepTally = field(default_factory=StepTally)

    def replay(self, records: Iterable[LedgerRecord | RecordBatch]) -> None:
        """Apply new records, of the allocation journal before those of the work journal.

        Raises `UnopenedAttemptError`, and `LedgerOutOfOrder` for an attempt whose opening was written late, by a full
        disk.
        """
        for record in records:
            found = next((attempt for attempt in reversed(self.attempts) if attempt.name == record.attempt), None)
            match record, found:
                case AttemptOpened(), None:
                    self.attempts.append(Attempt.from_opening(record))
                case AttemptOpened(), _:
                    raise LedgerOutOfOrder
                case Rank0Started(), None:  # work that no launcher has opened counts as another attempt
                    found = Attempt.from_opening(record)
                    self.attempts.append(found)
                    self._apply_work(record, found)
                case _, None:
                    raise UnopenedAttemptError(record.attempt)
                case AttemptClosed(), _:
                    found.record_sign_of_life(record.instant)
                    found.closed = True
                case _:
                    self._apply_work(record, found)

    def _apply_work(self, record: LedgerRecord | RecordBatch, attempt: Attempt) -> None:
        attempt.apply(record)
        self.tally.apply(record, attempt.phase)
