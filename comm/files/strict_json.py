"""Strict readers of what others have written: JSON of bounded depth, values of one type and a known range.

No fraction, boolean or quoted number is a whole number, no key stands twice, and a number is finite. Whatever does not
fit is `Malformed`, which says where in the file, what stands there, and what must.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from ..errors import Problem, printable

T = TypeVar("T")

LARGEST = 2**63 - 1
"""Of a whole number: what every reader of JSON, numpy and torch hold without loss."""
MAX_DEPTH = 64
"""Of JSON, lists and mappings inside each other. Files of ours have up to 8; recursion in Python ends near 1,000."""
_HEX = frozenset("0123456789abcdef")
_SHOWN = 100
"""Characters of a value in a message."""


class Malformed(ValueError):  # noqa: N818 -- says what the file is
    """A file that does not hold what it must. `where` is the place inside the file; empty for the file as a whole."""

    def __init__(self, where: str, value: object, hint: str) -> None:
        self.where, self.value, self.hint = where, shortened(value), hint
        place, words = printable(where, keep=""), printable(hint)
        super().__init__(f"{place} = {self.value!r}: {words}" if place else f"{words} ({self.value!r})")

    def problem(self, file: Path | str, fix: str) -> Problem:
        """The problem of `file`; `fix` says what to do about it."""
        field = f"{file}: {self.where}" if self.where else str(file)
        return Problem(field, self.value, f"{self.hint}; {fix}")


def shortened(value: object) -> object:
    """`value`, or the beginning of its text where that is long."""
    if isinstance(value, str):
        return value if len(value) <= _SHOWN else f"{value[:_SHOWN]}…"
    text = repr(value)
    return value if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def parse_json(raw: bytes | str) -> Item:
    """The tree that `raw` holds. Raises `Malformed` for anything but JSON in UTF-8 without NaN or a key twice."""
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed("", f"byte {error.start}", "is not UTF-8") from error
    if text.startswith("\ufeff"):
        hint = "is not JSON: it begins with a byte order mark; save it as UTF-8 without one"
        raise Malformed("", text[:_SHOWN], hint)
    try:
        tree = _DECODER.decode(text)
    except Malformed:
        raise
    except RecursionError as error:
        raise Malformed("", text[:20], f"is nested more than {MAX_DEPTH} deep") from error
    except ValueError as error:
        raise Malformed("", text[:_SHOWN], f"is not JSON: {error}") from error
    if text.count("{") + text.count("[") > MAX_DEPTH:
        _refuse_depth(tree)
    if "\\ud" in text or "\\uD" in text:
        _refuse_surrogates(tree)
    return Item(tree)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        seen: set[str] = set()
        for key, value in pairs:
            if key in seen:
                raise Malformed(key, value, "stands there twice")
            seen.add(key)
    return tree


def _no_number(name: str) -> float:
    raise Malformed("", name, "is not JSON: no number is NaN or infinite")


def _finite(digits: str) -> float:
    found = float(digits)
    if math.isinf(found):  # `1e999` is JSON by its grammar; written again it would be `Infinity`, which is none
        raise Malformed("", digits, "is larger than any finite number")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_no_number, parse_float=_finite)


def _refuse_depth(tree: object) -> None:
    """A walk level by level: it needs no recursion itself."""
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
    raise Malformed("", level[0], f"is nested more than {MAX_DEPTH} deep")


def _refuse_surrogates(tree: object) -> None:
    try:
        json.dumps(tree, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        value = error.object[max(0, error.start - 20) : error.end].encode(errors="backslashreplace").decode()
        raise Malformed("", value, "holds half of a surrogate pair, which is no character") from error


@dataclass(frozen=True, slots=True)
class Item:
    """A value from a file and where it stands there; what it is asked for, it is, or it is `Malformed`."""

    value: Any
    where: str = ""

    def malformed(self, hint: str) -> Malformed:
        """An error about this value."""
        return Malformed(self.where, self.value, hint)

    def whole(self, least: int = 0, most: int = LARGEST) -> int:
        """A whole number from `least` to `most`."""
        value = self.value
        if type(value) is not int:
            raise self.malformed("must be a whole number")
        if not least <= value <= most:
            raise self.malformed(f"must be from {least} to {most}")
        return value

    def number(self, least: float = -math.inf, most: float = math.inf) -> float:
        """A finite number from `least` to `most`."""
        value = self.value
        if type(value) not in (int, float):
            raise self.malformed("must be a number")
        try:
            found = float(value)
        except OverflowError as error:
            raise self.malformed("must be a finite number") from error
        if not math.isfinite(found):
            raise self.malformed("must be a finite number")
        if not least <= found <= most:
            raise self.malformed(f"must be from {least:g} to {most:g}")
        return found

    def text(self) -> str:
        """Text."""
        if type(self.value) is not str:
            raise self.malformed("must be text")
        return self.value

    def flag(self) -> bool:
        """true or false."""
        if type(self.value) is not bool:
            raise self.malformed("must be true or false")
        return self.value

    def list(self) -> list[Item]:
        """The items of a list."""
        if not isinstance(self.value, list):
            raise self.malformed("must be a list")
        return [Item(value, f"{self.where}[{index}]") for index, value in enumerate(self.value)]

    def mapping(self) -> dict[str, Any]:
        """The plain mapping."""
        if not isinstance(self.value, dict):
            raise self.malformed("must be a mapping of keys")
        return self.value

    def items(self) -> Iterable[tuple[str, Item]]:
        """Keys and values of a mapping."""
        return ((key, Item(value, self._under(key))) for key, value in self.mapping().items())

    def __contains__(self, key: str) -> bool:
        return key in self.mapping()

    def __getitem__(self, key: str) -> Item:
        tree = self.mapping()
        if key not in tree:
            raise Malformed(self._under(key), None, "is missing")
        return Item(tree[key], self._under(key))

    def get(self, key: str) -> Item | None:
        """The value of `key`; None where it is left out or null."""
        value = self.mapping().get(key)
        return None if value is None else Item(value, self._under(key))

    def only(self, keys: Iterable[str]) -> None:
        """Refuse every key that is not among `keys`."""
        known = frozenset(keys)
        for key, item in self.items():
            if key not in known:
                raise item.malformed("is no key of this format")

    def inside(self) -> str:
        """The name of a file that lies in the folder of this one, or in a folder of that."""
        name = self.text()
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\0" in name or "\\" in name:
            raise self.malformed("must name a file inside the folder: relative, without ..")
        return name

    def file_name(self) -> str:
        """The name of a file in the folder of this one."""
        name = self.inside()
        if "/" in name or len(name.encode()) > 255:
            raise self.malformed("must be the name of a file in the folder, without a folder of its own")
        return name

    def sha256(self) -> str:
        """A SHA-256 in hexadecimal digits."""
        found = self.text()
        if len(found) != 64 or not set(found) <= _HEX:
            raise self.malformed("must be a SHA-256: 64 hexadecimal digits")
        return found

    def build(self, cls: type[T]) -> T:
        """The dataclass `cls`, every field by its type; fields with a default may be left out, no other key may stand.

        Whole numbers are at least 0.
        """
        self.only(name for name, _, _ in _fields(cls))
        tree = self.mapping()
        values = {
            name: self[name]._of(kind) for name, kind, has_default in _fields(cls) if name in tree or not has_default
        }
        return cls(**values)

    def _of(self, kind: Any) -> Any:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin in (typing.Union, types.UnionType):
            return None if self.value is None else self._of(next(each for each in arguments if each is not type(None)))
        if origin is tuple:
            return tuple(item._of(arguments[0]) for item in self.list())
        if dataclasses.is_dataclass(kind):
            return self.build(typing.cast("type[Any]", kind))
        read: dict[Any, Callable[[], Any]]
        read = {int: self.whole, float: self.number, str: self.text, bool: self.flag}
        return read[kind]()

    def _under(self, key: str) -> str:
        shown = shortened(key)
        return f"{self.where}.{shown}" if self.where else str(shown)


def _fields(cls: Any) -> tuple[tuple[str, Any, bool], ...]:
    """Name, type and whether there is a default, of each field of a dataclass."""
    return _fields_of(cls)


@functools.cache
def _fields_of(cls: Any) -> tuple[tuple[str, Any, bool], ...]:
    hints = typing.get_type_hints(cls)
    return tuple(
        (
            field.name,
            hints[field.name],
            field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING,
        )
        for field in dataclasses.fields(cls)
        if field.init
    )


def plain(tree: Mapping[str, Any], where: str = "") -> Item:
    """An item of a tree that is there already."""
    return Item(dict(tree), where)
