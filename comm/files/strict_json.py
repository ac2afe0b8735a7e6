"""Strict JSON reader: bounded depth, values of one type and a known range.

A fraction, boolean or quoted number is not an integer, no key occurs twice, and numbers are finite. Anything else
raises `MalformedFileError` with the location, the value and what it must be.
"""

import collections.abc
import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ... import __version__
from ..errors import Problem, UnsupportedFormatConfigError, escape_unprintable
from .ranges import FieldRange, field_range

T = TypeVar("T")

MAX_INTEGER = 2**63 - 1
"""Largest integer: JSON readers, numpy and torch hold it without loss."""
MAX_DEPTH = 64
"""Deepest nesting of lists and mappings. Files of this project have up to 8; Python's recursion ends near 1,000."""
_SHOWN = 100
"""Most characters of a value in a message."""


class MalformedFileError(ValueError):
    """A file with invalid content. `location` is the place inside the file; empty for the file as a whole."""

    def __init__(self, location: str, value: object, hint: str) -> None:
        self.location, self.value, self.hint = location, shorten_for_message(value), hint
        place, words = escape_unprintable(location, keep=""), escape_unprintable(hint)
        super().__init__(f"{place} = {self.value!r}: {words}" if place else f"{words} ({self.value!r})")

    def to_problem(self, file: Path | str, fix: str) -> Problem:
        """Return the problem of `file`; `fix` says what to do about it."""
        field = f"{file}: {self.location}" if self.location else str(file)
        return Problem(field, self.value, f"{self.hint}; {fix}")


class UnsupportedFormatError(MalformedFileError):
    """A file of another format than `supported`; `writer` is the version of Shoestring that the file names, if any."""

    def __init__(self, file_kind: str, found: object, supported: int, writer: object) -> None:
        by = f"Shoestring {shorten_for_message(writer)}" if isinstance(writer, str) else "the version"
        reads = f"Shoestring {__version__} reads {file_kind} format {supported}"
        super().__init__("format", found, f"{reads}; use {by} that wrote it, or start a new run in another directory")

    def to_problem(self, file: Path | str, fix: str = "") -> Problem:
        """Return the problem of `file`; the error says itself what to do, so `fix` is not used."""
        return Problem(f"{file}: {self.location}", self.value, self.hint)

    def to_config_error(self, file: Path | str) -> UnsupportedFormatConfigError:
        """Return the error that commands show."""
        return UnsupportedFormatConfigError([self.to_problem(file)])


def shorten_for_message(value: object) -> object:
    """Return `value`, or the beginning of its text if that is long."""
    if isinstance(value, str):
        return value if len(value) <= _SHOWN else f"{value[:_SHOWN]}…"
    text = repr(value)
    return value if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def parse_json(raw: bytes | str) -> "JsonValue":
    """Parse JSON. Raises `MalformedFileError` for anything but UTF-8 without NaN, infinity or a repeated key."""
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedFileError("", f"byte {error.start}", "is not UTF-8") from error
    if text.startswith("\ufeff"):
        hint = "is not JSON: it begins with a byte order mark; save it as UTF-8 without one"
        raise MalformedFileError("", text[:_SHOWN], hint)
    try:
        tree = _DECODER.decode(text)
    except MalformedFileError:
        raise
    except RecursionError as error:
        raise MalformedFileError("", text[:20], f"is nested more than {MAX_DEPTH} deep") from error
    except ValueError as error:
        raise MalformedFileError("", text[:_SHOWN], f"is not JSON: {error}") from error
    # Cheap tests first: a text with at most 64 brackets cannot be too deep, as most records of a line file.
    if text.count("{") + text.count("[") > MAX_DEPTH:
        _refuse_depth(tree)
    if "\\ud" in text or "\\uD" in text:
        _refuse_surrogates(tree)
    return JsonValue(tree)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        seen: set[str] = set()
        for key, value in pairs:
            if key in seen:
                raise MalformedFileError(key, value, "is a repeated key")
            seen.add(key)
    return tree


def _no_number(name: str) -> float:
    raise MalformedFileError("", name, "is not JSON: numbers must be finite")


def _finite(digits: str) -> float:
    found = float(digits)
    if math.isinf(found):  # `1e999` is JSON by its grammar; written again it would be `Infinity`, which is none
        raise MalformedFileError("", digits, "is larger than any finite number")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_no_number, parse_float=_finite)


def _refuse_depth(tree: object) -> None:
    """Raise `MalformedFileError` for more than `MAX_DEPTH` levels, without recursion."""
    level = [tree]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for each in level:
            values: Iterable[object] = (
                each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
            )
            inner += [value for value in values if isinstance(value, dict | list)]
        level = inner
        if not level:
            return
    raise MalformedFileError("", level[0], f"is nested more than {MAX_DEPTH} deep")


def _refuse_surrogates(tree: object) -> None:
    try:
        json.dumps(tree, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        value = error.object[max(0, error.start - 20) : error.end].encode(errors="backslashreplace").decode()
        raise MalformedFileError("", value, "contains half of a surrogate pair, which is not a character") from error


@dataclass(frozen=True, slots=True)
class JsonValue:
    """A value from a file with its location. Readers raise `MalformedFileError` for any other type or range."""

    value: Any
    location: str = ""

    def malformed_error(self, hint: str) -> MalformedFileError:
        """Return an error about this value."""
        return MalformedFileError(self.location, self.value, hint)

    def as_integer(self, minimum: int = 0, maximum: int = MAX_INTEGER) -> int:
        """Return an integer from `minimum` to `maximum`."""
        value = self.value
        # Not `isinstance`: in Python `True` is an integer too.
        if type(value) is not int:
            raise self.malformed_error("must be a whole number")
        if not minimum <= value <= maximum:
            raise self.malformed_error(f"must be from {minimum} to {maximum}")
        return value

    def as_number(self, minimum: float = -math.inf, maximum: float = math.inf) -> float:
        """Return a finite number from `minimum` to `maximum`."""
        value = self.value
        if type(value) not in (int, float):
            raise self.malformed_error("must be a number")
        try:
            found = float(value)
        except OverflowError as error:
            raise self.malformed_error("must be a finite number") from error
        if not math.isfinite(found):
            raise self.malformed_error("must be a finite number")
        if not minimum <= found <= maximum:
            raise self.malformed_error(f"must be from {minimum:g} to {maximum:g}")
        return found

    def as_string(self) -> str:
        """Return a string."""
        if type(self.value) is not str:
            raise self.malformed_error("must be text")
        return self.value

    def as_word(self, names: Iterable[str]) -> str:
        """Return one of `names`."""
        found = self.as_string()
        if found not in tuple(names):
            raise self.malformed_error(f"must be one of {', '.join(names)}")
        return found

    def as_boolean(self) -> bool:
        """Return a boolean."""
        if type(self.value) is not bool:
            raise self.malformed_error("must be true or false")
        return self.value

    def as_list(self) -> "list[JsonValue]":
        """Return the items of a list."""
        if not isinstance(self.value, list):
            raise self.malformed_error("must be a list")
        return [JsonValue(value, f"{self.location}[{index}]") for index, value in enumerate(self.value)]

    def as_mapping(self) -> dict[str, Any]:
        """Return the mapping as a plain dict."""
        if not isinstance(self.value, dict):
            raise self.malformed_error("must be a mapping of keys")
        return self.value

    def items(self) -> "Iterable[tuple[str, JsonValue]]":
        """Yield the keys and values of a mapping."""
        return ((key, JsonValue(value, self._under(key))) for key, value in self.as_mapping().items())

    def __contains__(self, key: str) -> bool:
        return key in self.as_mapping()

    def __getitem__(self, key: str) -> "JsonValue":
        tree = self.as_mapping()
        if key not in tree:
            raise MalformedFileError(self._under(key), None, "is missing")
        return JsonValue(tree[key], self._under(key))

    def get(self, key: str) -> "JsonValue | None":
        """Return the value of `key`; None if it is missing or null."""
        value = self.as_mapping().get(key)
        return None if value is None else JsonValue(value, self._under(key))

    def reject_unknown_keys(self, keys: Iterable[str]) -> None:
        """Raise `MalformedFileError` for a key that is not among `keys`."""
        known = frozenset(keys)
        for key, item in self.items():
            if key not in known:
                raise item.malformed_error("is not a key of this format")

    def as_text_in(self, allowed: FieldRange) -> str:
        """Return text of a declared range, such as `RELATIVE_PATH`, `FILE_NAME` or `SHA256`."""
        return str(self._in_range(self.as_string(), allowed))

    def require_format(self, file_kind: str, supported: int, *, default: int | None = None) -> None:
        """Raise `UnsupportedFormatError` unless the key `format` is `supported`; without the key it is `default`."""
        tree = self.as_mapping()
        found = tree.get("format", default)
        if found != supported or type(found) is not int:
            raise UnsupportedFormatError(file_kind, found, supported, tree.get("version"))

    def as_dataclass(self, cls: type[T], *, ignore_unknown_keys: bool = False) -> T:
        """Build the dataclass `cls`, reading every field by its type and declared range (`comm/files/ranges.py`).

        Only fields with a default may be missing. Integers are at least 0; a field `Annotated[TYPE, READ]` is
        `READ(value)`, which gets the `JsonValue`; with `Annotated[TYPE, READ, PLAIN]` values of the type `PLAIN` are
        taken as they are. Raises `MalformedFileError`, also for a key that is not a field unless
        `ignore_unknown_keys`. A union of dataclasses is read by `as_one_of`.
        """
        fields = _json_fields(typing.cast("Any", cls))
        tree = self.as_mapping()
        if not ignore_unknown_keys:
            self.reject_unknown_keys(field.key for field in fields)
        place = f"{self.location}." if self.location else ""
        given: dict[str, Any] = {}
        for name, key, is_required, read, plain in fields:
            if key in tree:
                value = tree[key]
                given[name] = value if type(value) in plain else read(JsonValue(value, place + key))
            elif is_required:
                raise MalformedFileError(place + key, None, "is missing")
        return cls(**given)

    def as_one_of(self, classes: Iterable[type[T]], tag: str = "kind") -> T:
        """Build the one of several dataclasses whose name the key `tag` holds, like `as_dataclass`."""
        known = {cls.__name__: cls for cls in classes}
        name = self[tag].as_string()
        if name not in known:
            raise self[tag].malformed_error(f"must be one of {', '.join(known)}")
        rest = {key: value for key, value in self.as_mapping().items() if key != tag}
        return JsonValue(rest, self.location).as_dataclass(known[name])

    def _in_range(self, found: Any, allowed: FieldRange) -> Any:
        if (hint := allowed.refuse(found)) is not None:
            raise self.malformed_error(hint)
        return found

    def _under(self, key: str) -> str:
        shown = shorten_for_message(key)
        return f"{self.location}.{shown}" if self.location else str(shown)


def json_key(key: str) -> dict[str, str]:
    """Return the `metadata` of a field whose key in a file is `key` instead of its name."""
    return {_KEY: key}


def key_in_json(field: "dataclasses.Field[Any]") -> str:
    """Return the key of a field in a file."""
    key: str = field.metadata.get(_KEY, field.name)
    return key


_KEY = "json key"


class _JsonField(typing.NamedTuple):
    name: str
    key: str
    is_required: bool
    read: Callable[[JsonValue], Any]
    plain: frozenset[type]
    """Types whose values are taken as they are; a log has a million lines of dozens of numbers."""


# Cached: resolving type hints takes far longer than reading a record, and a manifest has thousands of records.
@functools.cache
def _json_fields(cls: Any) -> tuple[_JsonField, ...]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return tuple(
        _JsonField(
            field.name,
            key_in_json(field),
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
            _reader_in_range(hints[field.name], field_range(field)),
            _plain_types(hints[field.name]),
        )
        for field in dataclasses.fields(cls)
        if field.init
    )


def _reader_in_range(kind: Any, allowed: FieldRange | None) -> Callable[[JsonValue], Any]:
    read = _reader(kind)
    if allowed is None:
        return read
    return lambda item: None if (found := read(item)) is None else item._in_range(found, allowed)


def _reader(kind: Any) -> Callable[[JsonValue], Any]:
    """Return the function that reads a value of a type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        read: Callable[[JsonValue], Any] = arguments[1]
        return read
    if origin in (typing.Union, types.UnionType):
        kinds = [each for each in arguments if each is not types.NoneType]
        present = _reader(kinds[0]) if len(kinds) == 1 else lambda item: item.as_one_of(kinds)
        is_optional = len(kinds) < len(arguments)
        return lambda item: None if is_optional and item.value is None else present(item)
    if origin is list:
        each = _reader(arguments[0])
        return lambda item: [each(inner) for inner in item.as_list()]
    if origin in (tuple, collections.abc.Sequence):
        return functools.partial(_read_tuple, arguments[0], _reader(arguments[0]))
    if origin in (dict, collections.abc.Mapping):
        each = _reader(arguments[1])
        return lambda item: {key: each(inner) for key, inner in item.items()}
    if dataclasses.is_dataclass(kind):
        return lambda item: item.as_dataclass(typing.cast("type[Any]", kind))
    plain: dict[Any, Callable[[JsonValue], Any]]
    plain = {int: JsonValue.as_integer, float: JsonValue.as_number, str: JsonValue.as_string}
    return (plain | {bool: JsonValue.as_boolean})[kind]


def _read_tuple(kind: Any, read: Callable[[JsonValue], Any], item: JsonValue) -> tuple[Any, ...]:
    # A short path: logs hold millions of integers in lists, and an object with a location for each takes 28 times as
    # long.
    value = item.value
    if kind is int and type(value) is list and all(type(each) is int and 0 <= each <= MAX_INTEGER for each in value):
        return tuple(value)
    return tuple(read(inner) for inner in item.as_list())


def _plain_types(kind: Any) -> frozenset[type]:
    """Return the third arguments of `Annotated` in a type, and with one that of None if the type allows it."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        found = frozenset().union(*map(_plain_types, typing.get_args(kind)))
        return found | {types.NoneType} if found and types.NoneType in typing.get_args(kind) else found
    return frozenset(typing.get_args(kind)[2:]) if typing.get_origin(kind) is typing.Annotated else frozenset()
