"""Replaying the two journals: every millisecond of every GPU that was held goes to exactly one place.

The time between two records of rank 0 is what the second one charges, and the rest goes by the state the life was in:
starting, running, ended, or failed. So the parts add up by construction, whatever the records say.
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
    """What a launch is doing as of its last record."""

    NOT_STARTED = "no rank 0 yet"
    STARTING = "on the way to its first step"
    RUNNING = "training"
    ENDED = "done"
    FAILED = "ended by a fault"


class Attempt:
    """One launch: the GPUs it held, and where their time went."""

    def __init__(self, opened: Record) -> None:
        self.name: str = opened["attempt"]
        self.phase: str = opened["phase"]
        self.job: str | None = opened.get("job")
        self.ranks: int = opened["ranks"]
        """GPUs held; another number from a life's beginning on closes a segment and opens the next."""
        self.opened = Instant.from_record(opened)
        self.closed = False
        """Whether the launcher has given the GPUs back, or a later one has found it dead."""
        self.state = AttemptState.NOT_STARTED
        self.gpu_ms_by_bucket: Counter[str] = Counter()
        """GPU-milliseconds of no step up to the last record of rank 0, by bucket, `unattributed` and `FIRST_START_BUCKET`."""
        self.segments = 1
        self._held_ms = 0
        self._by_itself = opened["kind"] == "begin"
        self._cursor: Record = {key: opened[key] for key in _INSTANT}
        self._since_ns = 0
        self._counted_ms = 0
        self._lives = 0
        self._sign: Instant | None = None

    def record_sign_of_life(self, record: Mapping[str, object]) -> None:
        """The GPUs were held at the instant of `record`."""
        now = Instant.from_record(record)
        if self._sign is None or now.ns_since(self._sign) > 0:
            self._sign = now

    def replay_record(self, record: Record) -> None:
        """Apply one record of rank 0."""
        kind: str = record["kind"]
        charged_ms: int = record.get("gpu_ms", 0)
        free_ms = self._pass(record) * self.ranks - charged_ms
        if kind == "begin":
            self._spend(free_ms, dying=self.state in (AttemptState.STARTING, AttemptState.RUNNING))
            self.state = AttemptState.STARTING
            self._lives += 1
            self.segments += record["ranks"] != self.ranks
            self.ranks = record["ranks"]
            return
        self._spend(free_ms, dying=kind == "end" and not record["clean"])
        if kind in ("interval", "skipped"):
            self.gpu_ms_by_bucket[record.get("bucket", kind)] += charged_ms
        elif kind == "ready":
            self.state = AttemptState.RUNNING
        elif kind == "end":
            self.state = AttemptState.ENDED if record["clean"] else AttemptState.FAILED
            self.closed = self.closed or self._by_itself

    def replay_batch(self, batch: RecordBatch) -> None:
        """Apply steps and intervals of rank 0: as `simulate_program` of each, since none of them changes the state."""
        cursor, clock = self._cursor, batch.monotonic_ns
        if batch.boot == cursor["boot"]:
            first_ns = clock[0] - cursor["monotonic_ns"]
        else:
            first_ns = batch.first_wall_ns - cursor["wall_ns"]
        free_ms = self._advance(max(0, first_ns) + _rises(clock)) * self.ranks - batch.total_gpu_ms
        self._cursor = batch.last_instant()
        self._spend(free_ms, dying=False)
        self.gpu_ms_by_bucket.update(batch.gpu_ms_by_bucket)

    def _pass(self, now: Record) -> int:
        """Whole milliseconds from the last record to `now`.

        The same as `Instant.ns_since`, without making instants: of a long run there are a million records.
        """
        clock = "monotonic_ns" if now["boot"] == self._cursor["boot"] else "wall_ns"
        passed = self._advance(max(0, now[clock] - self._cursor[clock]))
        self._cursor = now
        return passed

    def _advance(self, nanoseconds: int) -> int:
        """Whole milliseconds of so much more time; what is cut comes with a later one."""
        self._since_ns += nanoseconds
        passed = self._since_ns // 1_000_000 - self._counted_ms
        self._counted_ms += passed
        self._held_ms += passed * self.ranks
        return passed

    def _spend(self, gpu_ms: int, *, dying: bool) -> None:
        """Time that no record has charged."""
        self.gpu_ms_by_bucket["hang" if dying else self._free_bucket()] += gpu_ms

    def _free_bucket(self) -> str:
        if self.state is AttemptState.NOT_STARTED or (self.state is AttemptState.STARTING and self._lives == 1):
            return FIRST_START_BUCKET
        return _FREE[self.state]

    def compute_usage(self, *, is_over: bool, last_heartbeat: Instant | None) -> tuple[int, int, Counter[str]]:
        """Milliseconds up to the last sign of life, GPU-milliseconds held, the buckets of those that no step has taken.

        `heard` is the launcher's last heartbeat. Nobody knows yet what a life is about that still goes on; one that is
        `over` without having said so has died.
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
        """As plain values."""
        kind, job = "begin" if self._by_itself else "open", {} if self.job is None else {"job": self.job}
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
        """Return the inverse of `to_tree`."""
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
    """The sum of all steps forward; a clock that goes back counts as one that stands."""
    return sum(max(0, later - earlier) for earlier, later in itertools.pairwise(clock))


_INSTANT = ("wall_ns", "monotonic_ns", "boot")
_PLAIN = ("closed", "segments", "_held_ms", "_since_ns", "_counted_ms", "_lives")
FIRST_START_BUCKET = "first start"
"""A launch's first way to a step: `initialization`, or `restart` if the launch before it has died."""
_FREE = {
    AttemptState.STARTING: "restart",
    AttemptState.RUNNING: "unattributed",
    AttemptState.ENDED: "idle",
    AttemptState.FAILED: "restart",
}
"""Where time goes that no record has charged."""


@dataclass
class StepTally:
    """What became of the steps, in GPU-milliseconds and tokens, as of the last record replayed."""

    retained: RetainedSteps = field(default_factory=RetainedSteps)
    """Steps that the weights hold."""
    rolled_back_ms: int = 0
    tokens_consumed: int = 0
    inherited_ms: int = 0
    inherited_consumed: int = 0
    inherited_retained: int = 0
    inherited_head: str | None = None
    terms_us: Counter[str] = field(default_factory=Counter)
    """GPU-microseconds of each term in the steps that were looked at closely, and those that are `bubble`."""
    sampled_us: int = 0
    """GPU-microseconds of these steps."""
    sampled_steps: int = 0
    _has_resumed: bool = False

    def replay_record(self, record: Record, phase: str) -> None:
        """Apply one record of the work journal, of a launch in `phase`."""
        kind = record["kind"]
        if kind == "step":
            # A step seen again was done again, whether or not a resume was recorded.
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
        """Steps after `step` have left the weights: what they cost was not productive after all."""
        self.rolled_back_ms += self.retained.roll_back_to(step)

    def comparable_totals(self) -> dict[str, Any]:
        """See `RetainedSteps.comparable_totals`."""
        return {**self._sums(), "retained": self.retained.comparable_totals()}

    def to_tree(self) -> dict[str, Any]:
        """As plain values."""
        return {**self._sums(), "has_resumed": self._has_resumed, "retained": self.retained.to_tree()}

    @staticmethod
    def from_tree(tree: dict[str, Any]) -> StepTally:
        """Return the inverse of `to_tree`."""
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
    """A launch was opened after its work was seen, since a full disk has kept its opening: read all of it again."""


class Ledger:
    """Both journals, replayed so far."""

    def __init__(self) -> None:
        self.attempts: dict[str, Attempt] = {}
        """In order of opening."""
        self.tally = StepTally()
        self.latest_opening: Record | None = None
        """The last opening, of a launch or a life."""

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
            # Work that no launcher has opened is a launch of its own.
            if record["attempt"] not in self.attempts:
                self._open(record)
            self.latest_opening = record
        attempt = self.attempts[record["attempt"]]
        attempt.replay_record(record)
        self.tally.replay_record(record, attempt.phase)

    def comparable_totals(self) -> dict[str, Any]:
        """What two readers of one ledger must agree on."""
        return {
            "attempts": [each.to_tree() for each in self.attempts.values()],
            "tally": self.tally.comparable_totals(),
        }

    def to_tree(self) -> dict[str, Any]:
        """As plain values."""
        attempts = [each.to_tree() for each in self.attempts.values()]
        return {"attempts": attempts, "tally": self.tally.to_tree(), "latest": self.latest_opening}

    @staticmethod
    def from_tree(tree: dict[str, Any]) -> Ledger:
        """Return the inverse of `to_tree`."""
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
