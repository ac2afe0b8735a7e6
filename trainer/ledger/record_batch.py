"""Many lines of a journal of work in one go: those of steps and intervals, of which a long run has a million.

One regular expression says that a line is as `Journal` writes it: keys, their order, types and ranges. So nothing is
left to parse or to check but the hash, and a launch takes up whole columns. That reads a million records in a third of
the time. Any other line is read by itself.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .terms import LEDGER_BUCKETS

MAX_BATCH_RECORDS = 8192
"""Of a batch: 5 MB of memory."""

_TEXT = r'"[^"\\\x00-\x1f\x7f-\xff]*"'
_WHOLE = "(0|[1-9][0-9]{0,14})"
"""Less than `records._MOST`."""
_STEP = "([1-9][0-9]{0,14})"
"""Steps count from 1."""
_CLOCK = "(0|-?[1-9][0-9]{0,17}|-?[1-8][0-9]{18})"
"""Within 64 bits."""
_LINE = re.compile(
    (
        rf'(\{{"attempt":({_TEXT}),"boot":({_TEXT}),(?:"bucket":"({"|".join(LEDGER_BUCKETS)})",)?"gpu_ms":{_WHOLE})'
        r',"hash":"([0-9a-f]{64})"'
        rf'(,"kind":"(?(4)interval|step)","monotonic_ns":{_CLOCK},'
        rf'(?(4)|"step":{_STEP},"tokens":{_WHOLE},)"wall_ns":{_CLOCK}\}})\n'
    ).encode()
)
"""Groups: before the hash, attempt, boot, bucket, gpu_ms, hash, behind it, monotonic_ns, step, tokens, wall_ns."""

LineFields = tuple[bytes, ...]


@dataclass(frozen=True)
class RecordBatch:
    """Consecutive records of one launch on one boot, each a step or an interval, in columns."""

    attempt: str
    boot: str
    monotonic_ns: Sequence[int]
    """Of each record."""
    first_wall_ns: int
    last_wall_ns: int
    gpu_ms_by_bucket: Mapping[str, int]
    """GPU-milliseconds by bucket, of intervals."""
    total_gpu_ms: int
    """GPU-milliseconds of intervals and steps."""
    steps: Sequence[int]
    """Numbers of the steps."""
    step_gpu_ms: Sequence[int]
    """Of each step."""
    step_tokens: Sequence[int]
    """Of each step."""

    def last_instant(self) -> dict[str, int | str]:
        """The instant of the last record."""
        return {"wall_ns": self.last_wall_ns, "monotonic_ns": self.monotonic_ns[-1], "boot": self.boot}


def parse_chained_line(line: bytes, head: bytes) -> LineFields | None:
    """The groups of `_LINE` where `line` is a step or an interval that is chained to `head`; None for any other."""
    found = _LINE.fullmatch(line)
    if found is None:
        return None
    row = found.groups()
    return row if hashlib.sha256(head + row[0] + row[6]).hexdigest().encode() == row[5] else None


def can_share_batch(one: LineFields, other: LineFields) -> bool:
    """Whether both rows may stand in one batch."""
    return one[1] == other[1] and one[2] == other[2]


def make_record_batch(rows: Sequence[LineFields]) -> RecordBatch:
    """The batch of `rows`, all alike."""
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
