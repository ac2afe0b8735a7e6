"""Replay of the two journals: every millisecond of every allocated GPU goes to exactly one bucket or step.

Of the time between two records of rank 0, the second record charges a part; the rest goes to the bucket of the
attempt's state: starting, running, ended or failed. So the parts add up by construction.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from .clock import Instant
from .journal import Record
from .record_batch import RecordBatch
from .retained_steps import RetainedSteps
from .terms import STEP_TIME_TERMS


class AttemptState(StrEnum):
    """State of an attempt as of its last record."""

    NOT_STARTED = "no rank 0 yet"
    STARTING = "on the way to its first step"
    RUNNING = "training"
    ENDED = "done"
    FAILED = "ended by a fault"


class Attempt:
    """One attempt: the GPUs it held, and their time by bucket."""

    def __init__(self, opened: Record) -> None:
        self.name: str = opened["attempt"]
        self.phase: str = opened["phase"]
        self.job: str | None = opened.get("job")
        self.ranks: int = opened["ranks"]
        """GPUs held; a start of rank 0 with another number begins a new segment."""
        self.opened = Instant.from_record(opened)
        self.closed = False
        """True if the launcher has released the GPUs, or a later one has found it dead."""
        self.state = AttemptState.NOT_STARTED
        self.gpu_ms_by_bucket: Counter[str] = Counter()
        """GPU-milliseconds outside steps up to rank 0's last record; also `unattributed` and `FIRST_START_BUCKET`."""
        self.segments = 1
        self._held_ms = 0
        self._without_launcher = opened["kind"] == "begin"
        self._cursor: Record = {key: opened[key] for key in _INSTANT}
        self._since_ns = 0
        self._counted_ms = 0
        self._rank0_starts = 0
        self._sign: Instant | None = None

    def record_sign_of_life(self, record: Mapping[str, object]) -> None:
        """Record that the GPUs were held at the instant of `record`."""
        now = Instant.from_record(record)
        if self._sign is None or now.ns_since(self._sign) > 0:
            self._sign = now

    def replay_record(self, record: Record) -> None:
        """Apply one record of rank 0."""
        kind: str = record["kind"]
        charged_ms: int = record.get("gpu_ms", 0)
        free_ms = self._advance_to(record) * self.ranks - charged_ms
        if kind == "begin":
            self._charge_free_time(free_ms, crashed=self.state in (AttemptState.STARTING, AttemptState.RUNNING))
            self.state = AttemptState.STARTING
            self._rank0_starts += 1
            self.segments += record["ranks"] != self.ranks
            self.ranks = record["ranks"]
            return
        self._charge_free_time(free_ms, crashed=kind == "end" and not record["clean"])
        if kind in ("interval", "skipped"):
            self.gpu_ms_by_bucket[record.get("bucket", kind)] += charged_ms
        elif kind == "ready":
            self.state = AttemptState.RUNNING
        elif kind == "end":
            self.state = AttemptState.ENDED if record["clean"] else AttemptState.FAILED
            self.closed = self.closed or self._without_launcher

    def replay_batch(self, batch: RecordBatch) -> None:
        """Apply steps and intervals of rank 0, like `replay_record` of each: none of them changes the state."""
        cursor, clock = self._cursor, batch.monotonic_ns
        if batch.boot == cursor["boot"]:
            first_ns = clock[0] - cursor["monotonic_ns"]
        else:
            first_ns = batch.first_wall_ns - cursor["wall_ns"]
        free_ms = self._advance(max(0, first_ns) + _rises(clock)) * self.ranks - batch.total_gpu_ms
        self._cursor = batch.last_instant()
        self._charge_free_time(free_ms, crashed=False)
        self.gpu_ms_by_bucket.update(batch.gpu_ms_by_bucket)

    def _advance_to(self, now: Record) -> int:
        """Return the whole milliseconds from the last record to `now`."""
        # Like `Instant.ns_since` without creating instants: a long run has a million records.
        clock = "monotonic_ns" if now["boot"] == self._cursor["boot"] else "wall_ns"
        passed = self._advance(max(0, now[clock] - self._cursor[clock]))
        self._cursor = now
        return passed

    def _advance(self, nanoseconds: int) -> int:
        """Return the whole milliseconds of `nanoseconds` more; the remainder is carried to the next call."""
        self._since_ns += nanoseconds
        passed = self._since_ns // 1_000_000 - self._counted_ms
        self._counted_ms += passed
        self._held_ms += passed * self.ranks
        return passed

    def _charge_free_time(self, gpu_ms: int, *, crashed: bool) -> None:
        """Charge time that no record has charged: to `hang` before a crash, else by the state."""
        self.gpu_ms_by_bucket["hang" if crashed else self._free_bucket()] += gpu_ms

    def _free_bucket(self) -> str:
        if self.state is AttemptState.NOT_STARTED or (self.state is AttemptState.STARTING and self._rank0_starts == 1):
            return FIRST_START_BUCKET
        return _FREE[self.state]

    def compute_usage(self, *, is_over: bool, last_heartbeat: Instant | None) -> tuple[int, int, Counter[str]]:
        """Return milliseconds and GPU-milliseconds up to the last heartbeat or record, and GPU-milliseconds by bucket.

        `last_heartbeat` is the launcher's. An attempt that `is_over` without a final record has crashed.
        """
        cursor = Instant.from_record(self._cursor)
        latest_ns = max((sign.ns_since(cursor) for sign in (self._sign, last_heartbeat) if sign is not None), default=0)
        lasted_ms = (self._since_ns + latest_ns) // 1_000_000
        tail_ms = (lasted_ms - self._counted_ms) * self.ranks
        died = is_over and self.state in (AttemptState.STARTING, AttemptState.RUNNING)
        spent = self.gpu_ms_by_bucket.copy()
        spent["hang" if died else self._free_bucket()] += tail_ms
        return lasted_ms, self._held_ms + tail_ms, spent

    def to_tree(self) -> dict[str, Any]:
        """Return the state as plain values."""
        kind, job = "begin" if self._without_launcher else "open", {} if self.job is None else {"job": self.job}
        own = {"kind": kind, "attempt": self.name, "phase": self.phase, "ranks": self.ranks}
        opened = {**own, **self.opened.to_record(), **job}
        tree = {name.removeprefix("_"): getattr(self, name) for name in _PLAIN}
        cursor = {key: self._cursor[key] for key in _INSTANT}
        sign = None if self._sign is None else self._sign.to_record()
        return tree | {
            "opened": opened,
            "state": self.state,
            "spent": dict(self.gpu_ms_by_bucket),
            "cursor": cursor,
            "sign": sign,
        }

    @staticmethod
    def from_tree(tree: dict[str, Any]) -> Attempt:
        """Return the attempt whose `to_tree` is `tree`."""
        made = Attempt(tree["opened"])
        for name in _PLAIN:
            setattr(made, name, tree[name.removeprefix("_")])
        made.state, made.gpu_ms_by_bucket, made._cursor = (
            AttemptState(tree["state"]),
            Counter(tree["spent"]),
            tree["cursor"],
        )
        made._sign = None if tree["sign"] is None else Instant.from_record(tree["sign"])
        return made


def _rises(clock: Sequence[int]) -> int:
    """Return the sum of all forward steps of a clock; a step back counts as 0."""
    return sum(max(0, later - earlier) for earlier, later in itertools.pairwise(clock))


_INSTANT = ("wall_ns", "monotonic_ns", "boot")
_PLAIN = ("closed", "segments", "_held_ms", "_since_ns", "_counted_ms", "_rank0_starts")
FIRST_START_BUCKET = "first start"
"""Time before an attempt's first step: `initialization`, or `restart` if the attempt before it has crashed."""
_FREE = {
    AttemptState.STARTING: "restart",
    AttemptState.RUNNING: "unattributed",
    AttemptState.ENDED: "idle",
    AttemptState.FAILED: "restart",
}
"""Bucket of time that no record has charged, by state."""


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
    terms_us: Counter[str] = field(default_factory=Counter)
    """GPU-microseconds of each term, and of `bubble`, in the sampled steps."""
    sampled_us: int = 0
    """GPU-microseconds of the sampled steps."""
    sampled_steps: int = 0
    _has_resumed: bool = False

    def replay_record(self, record: Record, phase: str) -> None:
        """Apply one record of the work journal, of a launch in `phase`."""
        kind = record["kind"]
        if kind == "step":
            # A repeated step number means that the step was done again, even without a resume record.
            self.roll_back_to(record["step"] - 1)
            self.retained.append(record["step"], record["gpu_ms"], record["tokens"], phase)
            self.tokens_consumed += record["tokens"]
        elif kind == "skipped":
            self.tokens_consumed += record["tokens"]
        elif kind == "begin":
            self._has_resumed = False
        elif kind == "resume":
            self._has_resumed = True
            self.roll_back_to(record["step"])
        elif kind == "ready" and not self._has_resumed:
            self.roll_back_to(0)  # its weights are initial ones
        elif kind == "inherited":
            self.inherited_ms += record["from_gpu_ms"]
            self.inherited_consumed += record["from_tokens_consumed"]
            self.inherited_retained += record["from_tokens_retained"]
            self.inherited_head = record["from_head"]
        elif kind == "terms":
            self.terms_us.update({term: record["us"][term] for term in (*STEP_TIME_TERMS, "bubble")})
            self.sampled_us += record["step_us"]
            self.sampled_steps += 1

    def replay_batch(self, batch: RecordBatch, phase: str) -> None:
        """Apply the steps of a batch, of a launch in `phase`."""
        self.tokens_consumed += sum(batch.step_tokens)
        if self.retained.extend(batch.steps, batch.step_gpu_ms, batch.step_tokens, phase):
            return
        for step, gpu_ms, tokens in zip(batch.steps, batch.step_gpu_ms, batch.step_tokens, strict=True):
            self.roll_back_to(step - 1)
            self.retained.append(step, gpu_ms, tokens, phase)

    def roll_back_to(self, step: int) -> None:
        """Move the cost of the steps after `step` from productive to rolled back."""
        self.rolled_back_ms += self.retained.roll_back_to(step)

    def comparable_totals(self) -> dict[str, Any]:
        """Return the totals that any two readers of one ledger agree on (`RetainedSteps.comparable_totals`)."""
        return {**self._sums(), "retained": self.retained.comparable_totals()}

    def to_tree(self) -> dict[str, Any]:
        """Return the tally as plain values."""
        return {**self._sums(), "has_resumed": self._has_resumed, "retained": self.retained.to_tree()}

    @staticmethod
    def from_tree(tree: dict[str, Any]) -> StepTally:
        """Return the tally whose `to_tree` is `tree`."""
        own = {name: tree[name] for name in _SUMS}
        own |= {"retained": RetainedSteps.from_tree(tree["retained"]), "terms_us": Counter(tree["terms_us"])}
        return StepTally(**own, _has_resumed=tree["has_resumed"])

    def _sums(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SUMS} | {"terms_us": dict(self.terms_us)}


_SUMS = (
    *("rolled_back_ms", "tokens_consumed", "inherited_ms", "inherited_consumed", "inherited_retained"),
    *("inherited_head", "sampled_us", "sampled_steps"),
)


class AttemptOpenedLate(Exception):  # noqa: N818 -- says what happened
    """Error for an attempt whose opening was written late, by a full disk: the ledger must be read again."""


class Ledger:
    """State of both journals, as replayed so far."""

    def __init__(self) -> None:
        self.attempts: dict[str, Attempt] = {}
        """Attempts by name, in order of opening."""
        self.tally = StepTally()
        self.latest_opening: Record | None = None
        """Last record that opened an attempt or started rank 0."""

    def replay_records(self, allocation: Iterable[Record], work: Iterable[Record | RecordBatch]) -> None:
        """Apply new records of both journals."""
        for record in allocation:
            if record["kind"] == "open":
                self._open(record)
            else:
                attempt = self.attempts[record["attempt"]]
                attempt.record_sign_of_life(record)
                attempt.closed = True
        for each in work:
            if isinstance(each, RecordBatch):
                attempt = self.attempts[each.attempt]
                attempt.replay_batch(each)
                self.tally.replay_batch(each, attempt.phase)
            else:
                self._replay_work(each)

    def _replay_work(self, record: Record) -> None:
        if record["kind"] == "begin":
            # Work that no launcher has opened counts as another attempt.
            if record["attempt"] not in self.attempts:
                self._open(record)
            self.latest_opening = record
        attempt = self.attempts[record["attempt"]]
        attempt.replay_record(record)
        self.tally.replay_record(record, attempt.phase)

    def comparable_totals(self) -> dict[str, Any]:
        """Return the totals that any two readers of one ledger agree on."""
        return {
            "attempts": [each.to_tree() for each in self.attempts.values()],
            "tally": self.tally.comparable_totals(),
        }

    def to_tree(self) -> dict[str, Any]:
        """Return the ledger's state as plain values."""
        attempts = [each.to_tree() for each in self.attempts.values()]
        return {"attempts": attempts, "tally": self.tally.to_tree(), "latest": self.latest_opening}

    @staticmethod
    def from_tree(tree: dict[str, Any]) -> Ledger:
        """Return the ledger whose `to_tree` is `tree`."""
        made = Ledger()
        attempts = map(Attempt.from_tree, tree["attempts"])
        made.attempts = {attempt.name: attempt for attempt in attempts}
        made.tally, made.latest_opening = StepTally.from_tree(tree["tally"]), tree["latest"]
        return made

    def _open(self, record: Record) -> None:
        if record["attempt"] in self.attempts:
            raise AttemptOpenedLate
        self.attempts[record["attempt"]] = Attempt(record)
        self.latest_opening = record
