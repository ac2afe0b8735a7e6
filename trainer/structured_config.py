"""Typed dataclasses from nested plain values, with every unknown key and wrong type reported in one pass.

Text from environment variables may be a secret: `InterpolatedText` keeps the `${oc.env:…}` it comes from, and files and
errors show that instead of the text.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ..comm.errors import Problem, raise_if_any


def field_default(field: dataclasses.Field[Any]) -> Any:
    """Return the field's default, or `dataclasses.MISSING` if it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def reset_to_defaults(config: "T", keys: Iterable[str]) -> "T":
    """Return a copy of nested dataclasses in which each of the dotted `keys` that has a default is set to it."""
    for key in keys:
        config = _with_default(config, key.split("."))
    return config


def _with_default(config: Any, path: Sequence[str]) -> Any:
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    found = next((field for field in dataclasses.fields(config) if field.name == path[0]), None)
    if found is None:
        return config
    value = getattr(config, path[0])
    new = _with_default(value, path[1:]) if path[1:] else field_default(found)
    return config if new is dataclasses.MISSING else dataclasses.replace(config, **{path[0]: new})


class InterpolatedText(str):
    """Resolved text with its source, an interpolation such as `${oc.env:TEAM}/runs`.

    `copy`, `dataclasses.replace` and `dataclasses.asdict` keep the source; `repr` and so error messages show it.
    """

    source: str

    def __new__(cls, text: str, source: str) -> "InterpolatedText":
        """Attach `source` to the resolved `text`."""
        interpolated = super().__new__(cls, text)
        interpolated.source = source
        return interpolated

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]  # for copies: `__new__` wants both
        return str(self), self.source

    def __repr__(self) -> str:
        return repr(self.source)


def restore_interpolations(value: Any) -> Any:
    """Return nested plain values with every `InterpolatedText` replaced by its source, for files."""
    return map_texts(value, lambda text: text.source if isinstance(text, InterpolatedText) else text)


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return nested plain values with every text changed by `change`; tuples become lists."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_texts(item, change) for item in value]
    return value


T = TypeVar("T")


def build_dataclass(cls: type[T], tree: object, earlier_problems: Iterable[Problem] = ()) -> T:
    """Build the dataclass `cls` from nested mappings; missing fields get their defaults.

    Raises `ConfigError` with all problems, including the `earlier_problems`.
    """
    problems = list(earlier_problems)
    built, _ = parse_dataclass(cls, tree, problems)
    raise_if_any(problems)
    return built


def parse_dataclass(cls: type[T], tree: object, problems: list[Problem]) -> tuple[T, frozenset[str]]:
    """Build the dataclass `cls` as far as possible, so that further checks can run on it.

    A value that does not fit is appended to `problems` and replaced by its default. Also returns the dotted keys of all
    fields that may hold a default instead of the value that the user meant.
    """
    reader = _Reader(problems, set())
    built: T = reader.read(cls, tree, "", dataclasses.MISSING)
    return built, frozenset(reader.doubtful)


@dataclasses.dataclass(frozen=True)
class _Reader:
    problems: list[Problem]
    doubtful: set[str]

    def read(self, kind: Any, value: object, path: str, default: Any) -> Any:
        """Return `value` as `kind`; if it does not fit, record a problem and return `default`."""
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if dataclasses.is_dataclass(kind):
            return self._dataclass(kind, value, path)
        if origin in (typing.Union, types.UnionType):
            if value is None and type(None) in arguments:
                return None
            kinds = [kind for kind in arguments if kind is not type(None)]
            return self.read(next((kind for kind in kinds if type(value) is kind), kinds[0]), value, path, default)
        if origin is tuple and isinstance(value, list | tuple):
            return tuple(self._item(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
        if origin is dict and isinstance(value, Mapping):
            pairs = ((self._item(arguments[0], key, path), key, item) for key, item in value.items())
            return {built: self._item(arguments[1], item, f"{path}.{key}") for built, key, item in pairs}
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value):
            return float(value)
        if kind is int and isinstance(value, float) and value.is_integer():
            return int(value)  # 1e12 tokens
        if kind is str and isinstance(value, InterpolatedText):
            return value
        if kind in (int, str, bool) and type(value) is kind:  # not isinstance: True is an int there
            return value
        return self._refuse(Problem(path, value, f"must be {_in_words(kind)}"), kind, default)

    def _item(self, kind: Any, value: object, path: str) -> Any:
        return self.read(kind, value, path, dataclasses.MISSING)

    def _refuse(self, problem: Problem, kind: Any, default: Any) -> Any:
        self.problems.append(problem)
        self.doubtful.add(problem.field)
        return _empty(kind) if default is dataclasses.MISSING else default

    def _dataclass(self, cls: Any, value: object, path: str) -> Any:
        if not isinstance(value, Mapping):
            return self._refuse(Problem(path, value, "must be a group of keys"), cls, dataclasses.MISSING)
        hints = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        prefix = f"{path}." if path else ""
        arguments = {}
        for name, field in fields.items():
            if name not in value and field_default(field) is dataclasses.MISSING:
                problem = Problem(f"{prefix}{name}", None, "is missing and has no default")
                arguments[name] = self._refuse(problem, hints[name], dataclasses.MISSING)
        for key, item in value.items():
            if key in fields:
                arguments[key] = self.read(hints[key], item, f"{prefix}{key}", field_default(fields[key]))
            else:
                self._unknown(f"{prefix}{key}", str(key), item, fields, prefix)
        return cls(**arguments)

    def _unknown(self, path: str, key: str, item: object, known: Iterable[str], prefix: str) -> None:
        """Record an unknown key, and the known fields that it may have been meant for."""
        close = _close_names(key, known)
        names = sorted(known)
        listed = f"there are: {', '.join(names)}" if len(names) <= _MAX_LISTED else "see docs/configuration.md"
        hint = f"did you mean {close[0]}?" if close else listed
        self.problems.append(Problem(path, item, f"no such key; {hint}"))
        self.doubtful.update(f"{prefix}{name}" for name in close or known)


_MAX_LISTED = 8
"""Largest number of names that an error about an unknown key lists."""


def _close_names(key: str, names: Iterable[str]) -> list[str]:
    """Return the names that resemble `key` as a whole or in some of their consecutive words, the closest first."""
    found = []
    for name in names:
        words = name.split("_")
        parts = ["_".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)]
        best = max(difflib.SequenceMatcher(None, part, key).ratio() for part in parts)
        if best >= 0.75:  # at 0.6, difflib's default, `ramp_from` resembles `sample_prompt`
            found.append((best, difflib.SequenceMatcher(None, name, key).ratio(), name))
    return [name for *_, name in sorted(found, reverse=True)[:3]]


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of more digits than a float has room for
        return False


def _empty(kind: Any) -> Any:
    """Return a placeholder of the type for a field without a default; checks skip it."""
    if dataclasses.is_dataclass(kind):
        return _Reader([], set()).read(kind, {}, "", dataclasses.MISSING)
    origin = typing.get_origin(kind)
    return None if origin in (typing.Union, types.UnionType) else (origin or kind)()


def _in_words(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is tuple:
        return "a list: [a, b]"
    if origin is dict:
        return "a mapping: {0: 0.3}"
    return {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}.get(kind, str(kind))
