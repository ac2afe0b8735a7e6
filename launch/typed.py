"""From a tree of plain values to typed dataclasses, with every unknown key and wrong type found in one pass."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ..comm.refusal import Problem, refuse_if_any

T = TypeVar("T")


def build(cls: type[T], tree: object, before: Iterable[Problem] = ()) -> T:
    """Make the dataclass `cls` from nested mappings; fields left out keep defaults.

    Raises `Refused` with all problems, those found `before` included.
    """
    problems = list(before)
    result = _convert(cls, tree, "", problems)
    refuse_if_any(problems)
    made: T = result
    return made


def _convert(kind: Any, value: object, path: str, problems: list[Problem]) -> Any:
    """`value` as `kind`. What does not fit is added to `problems` and answered with None."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _convert_dataclass(kind, value, path, problems)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, path, problems)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(arguments[0], item, f"{path}[{i}]", problems) for i, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        pairs = ((_convert(arguments[0], k, path, problems), v, k) for k, v in value.items())
        return {key: _convert(arguments[1], item, f"{path}.{k}", problems) for key, item, k in pairs}
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e12 tokens
    if kind in (int, str, bool) and type(value) is kind:  # not isinstance: True is an int there
        return value
    problems.append(Problem(path, value, f"must be {_in_words(kind)}"))
    return None


def _convert_dataclass(cls: Any, value: object, path: str, problems: list[Problem]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(Problem(path, value, "must be a group of keys"))
        return None
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    before = len(problems)
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in value:
            problems.append(
                Problem(f"{path}.{field.name}" if path else field.name, None, "is missing and has no default")
            )
    arguments = {}
    for key, item in value.items():
        child = f"{path}.{key}" if path else str(key)
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(sorted(known))}"
            problems.append(Problem(child, item, f"no such key; {hint}"))
        else:
            arguments[key] = _convert(hints[key], item, child, problems)
    return cls(**arguments) if len(problems) == before else None


def _in_words(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is tuple:
        return "a list: [a, b]"
    if origin is dict:
        return "a mapping: {0: 0.3}"
    return {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}.get(kind, str(kind))
