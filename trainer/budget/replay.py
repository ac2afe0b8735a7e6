"""Replaying the two journals: every millisecond of every GPU that was held goes to exactly one place.

The time between two records of rank 0 is what the second one charges, and the rest goes by the state the life was in:
starting, running, ended, or failed. So the parts add up by construction, whatever the records say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from .clock import Instant
from .journal import Record
from .terms import TERMS


class State(StrEnum):
    """What a launch is doing as of its last record."""

    EMPTY = "no rank 0 yet"
    STARTING = "on the way to its first step"
    RUNNING = "training"
    ENDED = "done"
    FAILED = "ended by a fault"


@dataclass(frozen=True)
class Step:
    """A step that the weights hold."""

    number: int
    gpu_ms: int
    tokens: int
    phase: str


class Attempt:
    """One launch: the GPUs it held, and where their time went."""

    def __init__(self, opened: Record) -> None:
        self.name: str = opened["attempt"]
        self.phase: str = opened["phase"]
        self.job: str | None = opened.get("job")
        self.ranks: int = opened["ranks"]
        """GPUs held; another number from a life's beginning on closes a segment and opens the next."""
        self.opened = Instant.of(opened)
        self.closed = False
        """Whether the launcher has given the GPUs back, or a later one has found it dead."""
        self.state = State.EMPTY
        self.spent: Counter[str] = Counter()
        """GPU-milliseconds of no step up to the last record of rank 0, by bucket, `unknown` and `FIRST_START`."""
        self.segments = 1
        self._held_ms = 0
        self._by_itself = opened["kind"] == "begin"
        self._cursor = self.opened
        self._since_ns = 0
        self._counted_ms = 0
        self._lives = 0
        self._sign: Instant | None = None

    def sign(self, record: Mapping[str, object]) -> None:
        """The GPUs were held at the instant of `record`."""
        now = Instant.of(record)
        if self._sign is None or now.ns_since(self._sign) > 0:
            self._sign = now

    def replay(self, record: Record) -> None:
        """Apply one record of rank 0."""
        kind: str = record["kind"]
        charged_ms: int = record.get("gpu_ms", 0)
        free_ms = self._pass(Instant.of(record)) * self.ranks - charged_ms
        if kind == "begin":
            self._spend(free_ms, dying=self.state in (State.STARTING, State.RUNNING))
            self.state = State.STARTING
            self._lives += 1
            self.segments += record["ranks"] != self.ranks
            self.ranks = record["ranks"]
            return
        self._spend(free_ms, dying=kind == "end" and not record["clean"])
        if kind in ("interval", "skipped"):
            self.spent[record.get("bucket", kind)] += charged_ms
        elif kind == "ready":
            self.state = State.RUNNING
        elif kind == "end":
            self.state = State.ENDED if record["clean"] else State.FAILED
            self.closed = self.closed or self._by_itself

    def _pass(self, now: Instant) -> int:
        """Whole milliseconds from the last record to `now`; what is cut comes with a later one."""
        self._since_ns += now.ns_since(self._cursor)
        self._cursor = now
        passed = self._since_ns // 1_000_000 - self._counted_ms
        self._counted_ms += passed
        self._held_ms += passed * self.ranks
        return passed

    def _spend(self, gpu_ms: int, *, dying: bool) -> None:
        """Time that no record has charged."""
        self.spent["hang" if dying else self._free_bucket()] += gpu_ms

    def _free_bucket(self) -> str:
        if self.state is State.EMPTY or (self.state is State.STARTING and self._lives == 1):
            return FIRST_START
        return _FREE[self.state]

    def outcome(self, *, over: bool) -> tuple[int, int, Counter[str]]:
        """Milliseconds up to the last sign of life, GPU-milliseconds held, the buckets of those that no step has taken.

        Nobody knows yet what a life is about that still goes on; one that is `over` without having said so has died.
        """
        latest_ns = 0 if self._sign is None else self._sign.ns_since(self._cursor)
        lasted_ms = (self._since_ns + latest_ns) // 1_000_000
        tail_ms = (lasted_ms - self._counted_ms) * self.ranks
        died = over and self.state in (State.STARTING, State.RUNNING)
        spent = self.spent.copy()
        spent["hang" if died else self._free_bucket()] += tail_ms
        return lasted_ms, self._held_ms + tail_ms, spent


FIRST_START = "first start"
"""A launch's first way to a step: `initialisation`, or `recovery` if the launch before it has died."""
_FREE = {
    State.STARTING: "recovery",
    State.RUNNING: "unknown",
    State.ENDED: "idle",
    State.FAILED: "recovery",
}
"""Where time goes that no record has charged."""


@dataclass
class Tally:
    """What became of the steps, in GPU-milliseconds and tokens, as of the last record replayed."""

    retained: list[Step] = field(default_factory=list)
    """Steps that the weights hold, in order."""
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

    def replay(self, record: Record, phase: str) -> None:
        """Apply one record of the work journal, of a launch in `phase`."""
        kind = record["kind"]
        if kind == "step":
            # A step seen again was done again, whether or not a resume was recorded.
            self.roll_back_to(record["step"] - 1)
            self.retained.append(Step(record["step"], record["gpu_ms"], record["tokens"], phase))
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
            self.terms_us.update({term: record["us"][term] for term in (*TERMS, "bubble")})
            self.sampled_us += record["step_us"]
            self.sampled_steps += 1

    def roll_back_to(self, step: int) -> None:
        """Steps after `step` have left the weights: what they cost was not productive after all."""
        while self.retained and self.retained[-1].number > step:
            self.rolled_back_ms += self.retained.pop().gpu_ms


class Ledger:
    """Both journals, replayed so far."""

    def __init__(self) -> None:
        self.attempts: dict[str, Attempt] = {}
        """In order of opening."""
        self.tally = Tally()
        self.latest: Record | None = None
        """The last opening, of a launch or a life."""

    def replay(self, allocation: Iterable[Record], work: Iterable[Record]) -> None:
        """Apply new records of both journals."""
        for record in allocation:
            if record["kind"] == "open":
                self._open(record)
            else:
                attempt = self.attempts[record["attempt"]]
                attempt.sign(record)
                attempt.closed = True
        for record in work:
            if record["kind"] == "begin":
                # Work that no launcher has opened is a launch of its own.
                if record["attempt"] not in self.attempts:
                    self._open(record)
                self.latest = record
            attempt = self.attempts[record["attempt"]]
            attempt.replay(record)
            self.tally.replay(record, attempt.phase)

    def _open(self, record: Record) -> None:
        self.attempts[record["attempt"]] = Attempt(record)
        self.latest = record
