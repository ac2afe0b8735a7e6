"""Check of each ledger record's keys, types and ranges; the hash chain alone does not validate its content."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from ...comm.files.strict_json import MAX_INTEGER, JsonValue, MalformedFileError, UnsupportedFormatError
from .journal import JournalReader, Record
from .terms import LEDGER_BUCKETS, LEDGER_FORMAT, PUBLISHED_GPU_HOURS, STEP_TIME_TERMS

_MOST_RANKS = 10**7
_WHOLE = (
    "gpu_ms",
    "tokens",
    "step",
    "step_us",
    "from_gpu_ms",
    "from_tokens_consumed",
    "from_tokens_retained",
    "records",
)
_OPENING = ("open", "begin")
"""Kinds of record that open an attempt: of the launcher's half and of rank 0's."""
_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "open": ("version", "ranks", "phase", "budget_gpu_hours"),
        "close": (),
        "begin": ("version", "ranks", "phase", "budget_gpu_hours"),
        "ready": (),
        "step": ("step", "gpu_ms", "tokens"),
        "skipped": ("step", "gpu_ms", "tokens"),
        "interval": ("bucket", "gpu_ms"),
        "resume": ("step",),
        "terms": ("step", "step_us", "us"),
        "inherited": ("from_gpu_ms", "from_tokens_consumed", "from_tokens_retained", "from_head"),
        "end": ("clean",),
        "left_out": ("records",),
    }
)
"""Required keys of each kind, in addition to attempt and instant; an unknown kind is of a later version."""
_MOST = 2**53
"""Largest count or time."""


def read_checked_records(path: Path) -> list[Record]:
    """Return a ledger journal's checked records. Raises `ConfigError` like `read_journal`, or for a bad value."""
    return JournalReader(path, check=check_record).new_records()


def check_record(record: Record) -> None:
    """Raise `MalformedFileError` for a record with a missing key, or a value of another type or range."""
    kind = record.get("kind")
    needed = _KEYS.get(kind) if type(kind) is str else None
    if needed is not None and _is_valid_fast(record, needed):
        return  # fast path: a long run has a million records
    _find(JsonValue(record), needed)


def _is_valid_fast(record: Record, needed: tuple[str, ...]) -> bool:
    """Return True for a valid record of a frequent kind; False means that `_find` must check it."""
    for key in ("wall_ns", "monotonic_ns"):
        value = record.get(key)
        if type(value) is not int or not -MAX_INTEGER <= value <= MAX_INTEGER:
            return False
    if type(record.get("attempt")) is not str or type(record.get("boot")) is not str:
        return False
    for key in needed:
        value = record.get(key)
        if key not in _WHOLE or type(value) is not int or not 0 <= value <= _MOST:
            return False
    return True


def _find(item: JsonValue, needed: tuple[str, ...] | None) -> None:
    if item["kind"].as_string() in _OPENING:
        _check_format(item)
    for key in needed or ():
        _check(item, key)
    for key in ("wall_ns", "monotonic_ns"):
        item[key].as_integer(-MAX_INTEGER)  # a wall clock may be set to anything
    for key in ("attempt", "boot"):
        item[key].as_string()
    for key in ("job", "from_allocation_head"):
        if item.get(key) is not None:
            item[key].as_string()


def _check_format(opening: JsonValue) -> None:
    found = opening.value.get("format", 1)
    if found != LEDGER_FORMAT or type(found) is not int:
        raise UnsupportedFormatError("ledger", found, LEDGER_FORMAT, opening.value.get("version"))


def _check(item: JsonValue, key: str) -> None:
    value = item[key]
    if key in _WHOLE:
        value.as_integer(0, _MOST)
    elif key == "ranks":
        value.as_integer(1, _MOST_RANKS)
    elif key == "budget_gpu_hours":
        if not value.as_number() > 0:
            raise value.malformed_error("must be greater than 0")
    elif key == "phase":
        if value.as_string() not in PUBLISHED_GPU_HOURS:
            raise value.malformed_error(f"must be one of {', '.join(PUBLISHED_GPU_HOURS)}")
    elif key == "bucket":
        if value.as_string() not in LEDGER_BUCKETS:
            raise value.malformed_error(f"must be one of {', '.join(LEDGER_BUCKETS)}")
    elif key == "us":
        for term in (*STEP_TIME_TERMS, "bubble"):
            value[term].as_integer(-_MOST, _MOST)  # a clock that goes back gives a term below 0
    elif key == "clean":
        value.as_boolean()
    elif key in ("from_head", "version"):
        value.as_string()
    else:
        raise MalformedFileError(key, None, "is not known")  # a key of `_KEYS` without a rule
