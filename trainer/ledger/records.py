"""Records of both journals, one class for each kind; the hash chain alone does not validate their content.

A record is the instant at which something happened to an attempt. On disk its keys are the fields, and `kind`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any

from ...comm.files.strict_json import JsonValue, parse_json
from .clock import Instant
from .terms import LEDGER_BUCKETS, LEDGER_FORMAT, PUBLISHED_GPU_HOURS, STEP_TIME_TERMS

_MOST_RANKS = 10**7
_MOST = 2**53
"""Largest count or time."""


def _read_hours(item: JsonValue) -> float:
    if not item.as_number() > 0:
        raise item.malformed_error("must be greater than 0")
    return float(item.value)


def _read_terms(item: JsonValue) -> Mapping[str, int]:
    # A clock that goes back gives a term below 0.
    return {term: item[term].as_integer(-_MOST, _MOST) for term in (*STEP_TIME_TERMS, "bubble")}


_Count = Annotated[int, lambda item: item.as_integer(0, _MOST)]
_Ranks = Annotated[int, lambda item: item.as_integer(1, _MOST_RANKS)]
_Phase = Annotated[str, lambda item: item.as_word(PUBLISHED_GPU_HOURS)]
_Bucket = Annotated[str, lambda item: item.as_word(LEDGER_BUCKETS)]


@dataclass(frozen=True, kw_only=True)
class LedgerRecord(Instant):
    """Instant of an attempt. A heartbeat is one, and so is a record of a kind that a later version has added."""

    attempt: str

    @property
    def instant(self) -> Instant:
        """The instant alone."""
        return Instant(self.wall_ns, self.monotonic_ns, self.boot)


@dataclass(frozen=True, kw_only=True)
class _Opening(LedgerRecord):
    version: str
    """Version of Shoestring."""
    ranks: _Ranks
    """GPUs held."""
    phase: _Phase
    budget_gpu_hours: Annotated[float, _read_hours]
    job: str | None = None
    """Scheduler's job ID."""
    format: int = LEDGER_FORMAT


class AttemptOpened(_Opening):
    """The launcher holds the GPUs from here."""


@dataclass(frozen=True, kw_only=True)
class AttemptClosed(LedgerRecord):
    """The launcher has released the GPUs."""

    reason: str = ""
    """Text for a reader of the file."""


class Rank0Started(_Opening):
    """A process of rank 0 begins; an attempt that no launcher has opened begins with it."""


class TrainingReady(LedgerRecord):
    """The first step begins."""


@dataclass(frozen=True, kw_only=True)
class ChargedRecord(LedgerRecord):
    """Record that charges the time before it."""

    gpu_ms: _Count
    """GPU-milliseconds before this instant."""


@dataclass(frozen=True, kw_only=True)
class StepDone(ChargedRecord):
    """A step was applied to the weights."""

    step: _Count
    tokens: _Count


class StepSkipped(StepDone):
    """A step was not applied: its tokens are consumed, not retained."""


@dataclass(frozen=True, kw_only=True)
class IntervalCharged(ChargedRecord):
    """Time of a bucket outside steps."""

    bucket: _Bucket


@dataclass(frozen=True, kw_only=True)
class Resumed(LedgerRecord):
    """The weights are those after `step` again: later steps are rolled back."""

    step: _Count


@dataclass(frozen=True, kw_only=True)
class StepTimed(LedgerRecord):
    """A sampled step of `step_us` GPU-microseconds over all ranks."""

    step: _Count
    step_us: _Count
    us: Annotated[Mapping[str, int], _read_terms]
    """GPU-microseconds of each of `STEP_TIME_TERMS`, and of `bubble`, the pipeline wait of the ideal program."""


@dataclass(frozen=True, kw_only=True)
class TotalsInherited(LedgerRecord):
    """Totals of a checkpoint that came without its ledger."""

    from_gpu_ms: _Count
    from_tokens_consumed: _Count
    from_tokens_retained: _Count
    from_head: str
    from_allocation_head: str | None = None


@dataclass(frozen=True, kw_only=True)
class Rank0Ended(LedgerRecord):
    """The process of rank 0 ends; `clean` is False after a fault."""

    clean: bool


@dataclass(frozen=True, kw_only=True)
class RecordsLeftOut(LedgerRecord):
    """A full disk did not take a number of records."""

    records: _Count


_KINDS: Mapping[str, type[LedgerRecord]] = MappingProxyType(
    {
        "open": AttemptOpened,
        "close": AttemptClosed,
        "begin": Rank0Started,
        "ready": TrainingReady,
        "step": StepDone,
        "skipped": StepSkipped,
        "interval": IntervalCharged,
        "resume": Resumed,
        "terms": StepTimed,
        "inherited": TotalsInherited,
        "end": Rank0Ended,
        "left_out": RecordsLeftOut,
    }
)
_KIND_OF = {cls: kind for kind, cls in _KINDS.items()}


def parse_record(line: bytes) -> LedgerRecord:
    """Parse a line of a journal.

    Raises `MalformedFileError` for a record with a missing key, or a value of another type or range, and
    `UnsupportedFormatError` for one that opens an attempt of another ledger format.
    """
    item = parse_json(line)
    cls = _KINDS.get(item["kind"].as_string(), LedgerRecord)
    if issubclass(cls, _Opening):
        item.require_format("ledger", LEDGER_FORMAT, default=1)
    return item.as_dataclass(cls, ignore_unknown_keys=True)


def record_now(cls: Callable[..., LedgerRecord], attempt: str, **fields: Any) -> dict[str, Any]:
    """Return the content, for a `JournalWriter`, of a record of class `cls` at this instant."""
    return to_content(cls(**vars(Instant.now()), attempt=attempt, **fields))


def to_content(record: LedgerRecord) -> dict[str, Any]:
    """Return the content of `record` for a `JournalWriter`."""
    return {"kind": _KIND_OF[type(record)], **{key: value for key, value in vars(record).items() if value is not None}}
