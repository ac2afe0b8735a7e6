"""Batches of consecutive step and interval records of a work journal, of which a long run has a million.

One regular expression checks that a line is as `JournalWriter` writes it: keys, their order, types and ranges. Then
only the hash is left to check, and an attempt is replayed in whole columns. This reads a million records in a third
of the time. Any other line is read as a single record.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .terms import LEDGER_BUCKETS

MAX_BATCH_RECORDS = 8192
"""Most records in a batch: 5 MB of memory."""

_TEXT = r'"[^"\\\x00-\x1f\x7f-\xff]*"'
_WHOLE = "(0|[1-9][0-9]{0,14})"
"""Number below `records._MOST`."""
_STEP = "([1-9][0-9]{0,14})"
"""Step number, from 1."""
_CLOCK = "(0|-?[1-9][0-9]{0,17}|-?[1-8][0-9]{18})"
"""Clock value within 64 bits."""
_LINE = re.compile(
    (
        rf'(\{{"attempt":({_TEXT}),"boot":({_TEXT}),(?:"bucket":"({"|".join(LEDGER_BUCKETS)})",)?"gpu_ms":{_WHOLE})'
        r',"hash":"([0-9a-f]{64})"'
        rf'(,"kind":"(?(4)interval|step)","monotonic_ns":{_CLOCK},'
        rf'(?(4)|"step":{_STEP},"tokens":{_WHOLE},)"wall_ns":{_CLOCK}\}})\n'
    ).encode()
)
"""Groups: text before the hash, attempt, boot, bucket, gpu_ms, hash, text after it, monotonic_ns, step, tokens,
wall_ns."""

LineFields = tuple[bytes, ...]


@dataclass(frozen=True)
class RecordBatch:
    """Consecutive step and interval records of one attempt on one boot, in columns."""

    attempt: str
    boot: str
    monotonic_ns: Sequence[int]
    """Monotonic clock of each record."""
    first_wall_ns: int
    last_wall_ns: int
    gpu_ms_by_bucket: Mapping[str, int]
    """GPU-milliseconds of intervals, by bucket."""
    total_gpu_ms: int
    """GPU-milliseconds of intervals and steps."""
    steps: Sequence[int]
    """Numbers of the steps."""
    step_gpu_ms: Sequence[int]
    """GPU-milliseconds of each step."""
    step_tokens: Sequence[int]
    """Tokens of each step."""

    def last_instant(self) -> dict[str, int | str]:
        """Return the instant of the last record."""
        return {"wall_ns": self.last_wall_ns, "monotonic_ns": self.monotonic_ns[-1], "boot": self.boot}


def parse_chained_line(line: bytes, head: bytes) -> LineFields | None:
    """Return the groups of `_LINE` if `line` is a step or interval that is chained to `head`, else None."""
    found = _LINE.fullmatch(line)
    if found is None:
        return None
    row = found.groups()
    return row if hashlib.sha256(head + row[0] + row[6]).hexdigest().encode() == row[5] else None


def can_share_batch(one: LineFields, other: LineFields) -> bool:
    """Return True if both rows belong to one attempt and boot."""
    return one[1] == other[1] and one[2] == other[2]


def make_record_batch(rows: Sequence[LineFields]) -> RecordBatch:
    """Return the batch of `rows`, which all belong to one attempt and boot."""
    columns = list(zip(*rows, strict=True))
    charged: Counter[bytes] = Counter()
    steps: list[int] = []
    gpu_ms: list[int] = []
    tokens: list[int] = []
    for bucket, spent, step, count in zip(columns[3], map(int, columns[4]), columns[8], columns[9], strict=True):
        if bucket is None:
            steps.append(int(step))
            gpu_ms.append(spent)
            tokens.append(int(count))
        else:
            charged[bucket] += spent
    named = {bucket.decode(): spent for bucket, spent in charged.items()}
    return RecordBatch(
        attempt=rows[0][1][1:-1].decode(),
        boot=rows[0][2][1:-1].decode(),
        monotonic_ns=list(map(int, columns[7])),
        first_wall_ns=int(columns[10][0]),
        last_wall_ns=int(columns[10][-1]),
        gpu_ms_by_bucket=named,
        total_gpu_ms=sum(named.values()) + sum(gpu_ms),
        steps=steps,
        step_gpu_ms=gpu_ms,
        step_tokens=tokens,
    )
