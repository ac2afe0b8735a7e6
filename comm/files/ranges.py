"""Ranges beside fields: a field of a dataclass says which values it may have, and readers and checks ask it.

`heads: int = at_least(1, 4)` declares a field with the default 4. The configuration reference prints the ranges.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple, TypeVar

from ..errors import Problem

T = TypeVar("T")

REQUIRED: Any = dataclasses.MISSING
"""Default of a field that must be given."""
_KEY = "range"


@dataclass(frozen=True, slots=True)
class FieldRange:
    """Values that a field may have. None is allowed wherever the field's type allows it."""

    text: str
    """The range in words."""
    refuse: Callable[[Any], str | None]
    """Function that returns what a value must be, or None for a value in the range."""

    @property
    def metadata(self) -> "Mapping[str, FieldRange]":
        """The range as the `metadata` of `dataclasses.field`, for a field without a default among others."""
        return {_KEY: self}


class _Limit(NamedTuple):
    words: str
    bound: int
    is_met: Callable[[float, float], bool]
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.words} {self.bound:,}"


def at_least(least: int, default: T = REQUIRED, *, null: str = "") -> T:
    """Declare a number of at least `least`; `null` says what null is for."""
    limit = _Limit("at least", least, operator.ge)
    return _number(default, null, str(limit), limit)


def above(bound: int, default: T = REQUIRED, *, null: str = "") -> T:
    """Declare a number greater than `bound`; `null` says what null is for."""
    limit = _Limit("greater than", bound, operator.gt)
    return _number(default, null, str(limit), limit)


def between(
    least: int, most: int, default: T = REQUIRED, *, least_reason: str = "", most_reason: str = "", null: str = ""
) -> T:
    """Declare a number from `least` to `most`; the reasons end the messages about a number outside."""
    lower = _Limit("at least", least, operator.ge, least_reason)
    return _number(default, null, f"{least:,} to {most:,}", lower, _Limit("at most", most, operator.le, most_reason))


def fraction(default: T = REQUIRED, *, zero: bool = True) -> T:
    """Declare a number below 1 that is at least 0, or greater than 0 without `zero`."""
    lower = _Limit("at least", 0, operator.ge) if zero else _Limit("greater than", 0, operator.gt)
    upper = _Limit("less than", 1, operator.lt)
    return _number(default, "", f"{lower}, {upper}", lower, upper)


def one_of(names: Iterable[str], default: T = REQUIRED, *, reason: str = "") -> T:
    """Declare one of two or more names; `reason` ends the message about another one."""
    known = tuple(map(str, names))
    hint = f"must be {', '.join(known[:-1])} or {known[-1]}{reason}"
    text = ", ".join(f"`{name}`" for name in known)
    return _declare(default, text, lambda value: None if value in known else hint)


def not_empty(default: T = REQUIRED, hint: str = "must not be empty") -> T:
    """Declare text or a list that is not empty."""
    return _declare(default, "not empty", lambda value: None if value else hint)


def _refuse_relative_path(name: str) -> str | None:
    # A file from outside must not make a reader open files elsewhere. Backslashes separate folders on Windows.
    parts = PurePosixPath(name).parts
    is_inside = parts and not name.startswith("/") and ".." not in parts and "\0" not in name and "\\" not in name
    return None if is_inside else "must name a file inside the folder: relative, without .."


def _refuse_file_name(name: str) -> str | None:
    if (hint := _refuse_relative_path(name)) is not None:
        return hint
    is_name = "/" not in name and len(name.encode()) <= 255
    return None if is_name else "must be the name of a file in the same folder, without a path"


def _refuse_sha256(digits: str) -> str | None:
    is_sha256 = len(digits) == 64 and set(digits) <= set("0123456789abcdef")
    return None if is_sha256 else "must be a SHA-256: 64 hexadecimal digits"


RELATIVE_PATH = FieldRange("a path inside the folder of the file", _refuse_relative_path)
FILE_NAME = FieldRange("the name of a file in the same folder", _refuse_file_name)
SHA256 = FieldRange("64 hexadecimal digits", _refuse_sha256)


def field_range(field: dataclasses.Field[Any]) -> FieldRange | None:
    """Return the declared range of a field."""
    found: FieldRange | None = field.metadata.get(_KEY)
    return found


class CheckedConfig:
    """Base of configuration dataclasses, which are checked as a whole: ranges of fields, then rules between them."""

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each value outside its field's range and for each broken rule, nested ones included."""
        fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(self)  # type: ignore[arg-type]  # a subclass is
        for field in fields:
            value, allowed = getattr(self, field.name), field_range(field)
            if isinstance(value, CheckedConfig):
                yield from (problem.with_prefix(field.name) for problem in value.problems())
            elif allowed and value is not None and (hint := allowed.refuse(value)) is not None:
                yield Problem(field.name, value, hint)
        yield from self.rule_problems()

    def rule_problems(self) -> Iterator[Problem]:
        """Yield a problem for each rule between fields that is broken; values may be outside their ranges."""
        return iter(())


def _number(default: T, null: str, text: str, *limits: _Limit) -> T:
    end = f", or null {null}".rstrip() if default is None or null else ""

    def refuse(value: float) -> str | None:
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        broken = next((limit for limit in limits if not limit.is_met(value, limit.bound)), None)
        return None if broken is None else f"must be {broken}{broken.reason}{end}"

    return _declare(default, text, refuse)


def _declare(default: T, text: str, refuse: Callable[[Any], str | None]) -> T:
    return dataclasses.field(default=default, metadata=FieldRange(text, refuse).metadata)
