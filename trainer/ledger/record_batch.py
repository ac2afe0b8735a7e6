"""Reading of a journal's records, with consecutive steps and intervals in batches: a long run has a million.

One regular expression checks that a line is as `JournalWriter` writes it: keys, their order, types and ranges. An
attempt is then replayed in whole columns, which reads a million records in a third of the time. Any other line is read
as a single record.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...comm.errors import ConfigError
from ...comm.files.strict_json import MalformedFileError, UnsupportedFormatError
from .clock import Instant
from .journal import JournalReader
from .records import LedgerRecord, parse_record
from .terms import LEDGER_BUCKETS

MAX_BATCH_RECORDS = 8192
"""Most records in a batch: 5 MB of memory."""

_TEXT = r'"([^"\\\x00-\x1f\x7f-\xff]*)"'
_WHOLE = "(0|[1-9][0-9]{0,14})"
"""Number below `records._MOST`."""
_STEP = "([1-9][0-9]{0,14})"
"""Step number, from 1."""
_CLOCK = "(0|-?[1-9][0-9]{0,17}|-?[1-8][0-9]{18})"
"""Clock value within 64 bits."""
_LINE = re.compile(
    (
        rf'\{{"attempt":{_TEXT},"boot":{_TEXT},(?:"bucket":"({"|".join(LEDGER_BUCKETS)})",)?"gpu_ms":{_WHOLE},'
        rf'"hash":"[0-9a-f]{{64}}","kind":"(?(3)interval|step)","monotonic_ns":{_CLOCK},'
        rf'(?(3)|"step":{_STEP},"tokens":{_WHOLE},)"wall_ns":{_CLOCK}\}}\n'
    ).encode()
)
"""Groups: attempt, boot, bucket, gpu_ms, monotonic_ns, step, tokens, wall_ns."""

_Row = tuple[bytes, ...]


@dataclass(frozen=True)
class RecordBatch:
    """Consecutive step and interval records of one attempt on one boot, in columns."""

    attempt: str
    first: Instant
    last: Instant
    elapsed_ns: int
    """Sum of all forward steps of the monotonic clock from `first` to `last`; a step back counts as 0."""
    gpu_ms_by_bucket: Mapping[str, int]
    """GPU-milliseconds of intervals, by bucket."""
    steps: Sequence[int]
    """Numbers of the steps."""
    step_gpu_ms: Sequence[int]
    """GPU-milliseconds of each step."""
    step_tokens: Sequence[int]
    """Tokens of each step."""

    @property
    def gpu_ms(self) -> int:
        """GPU-milliseconds of intervals and steps."""
        return sum(self.gpu_ms_by_bucket.values()) + sum(self.step_gpu_ms)


def stream_records(reader: JournalReader, end: int | None = None) -> Iterator[LedgerRecord | RecordBatch]:
    """Yield the new records that begin before byte `end`.

    Raises `ConfigError` like `JournalReader.stream_lines`, and with its line for an invalid record.
    """
    rows: list[_Row] = []
    for line in reader.stream_lines(end):
        found = _LINE.fullmatch(line)
        row = None if found is None else found.groups()
        if rows and (row is None or row[0] != rows[0][0] or row[1] != rows[0][1] or len(rows) == MAX_BATCH_RECORDS):
            yield _make_batch(rows)
            rows = []
        if row is None:
            yield _read_record(reader, line)
        else:
            rows.append(row)
    if rows:
        yield _make_batch(rows)


def _read_record(reader: JournalReader, line: bytes) -> LedgerRecord:
    place = f"{reader.path}:{reader.position.number}"
    try:
        return parse_record(line)
    except UnsupportedFormatError as error:
        raise error.to_config_error(place) from error
    except MalformedFileError as error:
        hint = "restore the file, or read it with the version of Shoestring that wrote it"
        raise ConfigError([error.to_problem(place, hint)]) from error


def _make_batch(rows: Sequence[_Row]) -> RecordBatch:
    """Return the batch of `rows`, which all belong to one attempt and boot."""
    _, _, buckets, charged_ms, monotonic_ns, steps, tokens, wall_ns = zip(*rows, strict=True)
    charges: Counter[bytes] = Counter()
    step_gpu_ms: list[int] = []
    for bucket, gpu_ms in zip(buckets, map(int, charged_ms), strict=True):
        if bucket is None:
            step_gpu_ms.append(gpu_ms)
        else:
            charges[bucket] += gpu_ms
    attempt, boot, clock = rows[0][0].decode(), rows[0][1].decode(), list(map(int, monotonic_ns))
    return RecordBatch(
        attempt=attempt,
        first=Instant(int(wall_ns[0]), clock[0], boot),
        last=Instant(int(wall_ns[-1]), clock[-1], boot),
        elapsed_ns=sum(max(0, later - earlier) for earlier, later in itertools.pairwise(clock)),
        gpu_ms_by_bucket={bucket.decode(): gpu_ms for bucket, gpu_ms in charges.items()},
        steps=[int(step) for step in steps if step is not None],
        step_gpu_ms=step_gpu_ms,
        step_tokens=[int(count) for count in tokens if count is not None],
    )
