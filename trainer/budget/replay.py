"""Replaying the two journals: what was allocated, and what became of each step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...comm.refusal import Problem, Refused
from .clock import Instant

Record = dict[str, Any]


@dataclass(frozen=True)
class Segment:
    """GPUs held under one attempt, in whole."""

    attempt: str
    ranks: int
    milliseconds: int
    """From the first to the last sign of life in either journal."""
    idle_ms: int
    """Of these, after the last life said that it was done."""
    closed: bool
    """Whether the launcher gave the GPUs back; an open segment is a living run, or a launcher that was killed."""

    @property
    def gpu_ms(self) -> int:
        """GPU-milliseconds held."""
        return self.ranks * self.milliseconds


def segments(allocation: Sequence[Record], work: Sequence[Record]) -> list[Segment]:
    """The segments in order of opening. Work under an attempt that no launcher opened makes a segment of its own."""
    opening: dict[str, Record] = {}
    for record in (*allocation, *work):
        if record["kind"] in ("open", "begin"):
            opening.setdefault(record["attempt"], record)
    return [_segment(opened, allocation, work) for opened in opening.values()]


def _segment(opened: Record, allocation: Sequence[Record], work: Sequence[Record]) -> Segment:
    attempt, start = opened["attempt"], Instant.of(opened)
    held = [record for record in allocation if record["attempt"] == attempt]
    done = [record for record in work if record["attempt"] == attempt]
    signs = [Instant.of(record).ns_since(start) // 1_000_000 for record in (*held, *done)]
    ended_ms = Instant.of(done[-1]).ns_since(start) // 1_000_000 if done and done[-1]["kind"] == "end" else max(signs)
    closed = held[-1]["kind"] == "close" if held else done[-1]["kind"] == "end"
    return Segment(attempt, opened["ranks"], max(signs), max(signs) - ended_ms, closed)


@dataclass
class Tally:
    """What rank 0 has charged, in GPU-milliseconds and tokens, as of the last record replayed."""

    retained: list[Record] = field(default_factory=list)
    """Step records that the weights still hold, in order of steps."""
    rolled_back_ms: int = 0
    tokens_consumed: int = 0
    buckets: Counter[str] = field(default_factory=Counter)
    by_attempt: Counter[str] = field(default_factory=Counter)
    inherited_ms: int = 0
    inherited_consumed: int = 0
    inherited_retained: int = 0

    def replay(self, record: Record) -> None:
        """Apply one record of the work journal."""
        kind = record["kind"]
        self.by_attempt[record["attempt"]] += record.get("gpu_ms", 0)
        if kind == "step":
            # A step seen again was done again, whether or not a resume was recorded.
            self._roll_back_to(record["step"] - 1)
            self.retained.append(record)
            self.tokens_consumed += record["tokens"]
        elif kind == "resume":
            self._roll_back_to(record["step"])
        elif kind == "interval":
            self.buckets[record["bucket"]] += record["gpu_ms"]
        elif kind == "inherited":
            self.inherited_ms += record["from_gpu_ms"]
            self.inherited_consumed += record["from_tokens_consumed"]
            self.inherited_retained += record["from_tokens_retained"]

    def _roll_back_to(self, step: int) -> None:
        """Steps after `step` have left the weights: what they cost was not productive after all."""
        while self.retained and self.retained[-1]["step"] > step:
            self.rolled_back_ms += self.retained.pop()["gpu_ms"]


def tally(work: Sequence[Record]) -> Tally:
    """The whole work journal, replayed."""
    result = Tally()
    for record in work:
        result.replay(record)
    return result


def check_identity(run_dir: Path, held: Sequence[Segment], charged: Tally) -> None:
    """Raise Refused when rank 0 has charged an attempt more than it was allocated: its intervals overlap."""
    problems = [
        Problem(
            f"{run_dir}/ledger, attempt {segment.attempt}",
            charged.by_attempt[segment.attempt],
            f"GPU-ms charged exceed the {segment.gpu_ms} allocated; two intervals overlap, or the ranks differ",
        )
        for segment in held
        if charged.by_attempt[segment.attempt] + segment.idle_ms * segment.ranks > segment.gpu_ms
    ]
    if problems:
        raise Refused(problems)
