"""The default of a field of a nested configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def default_of(field: dataclasses.Field[Any]) -> Any:
    """What the field holds when it is left out; `dataclasses.MISSING` where it may not be."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def with_defaults(config: T, keys: Iterable[str]) -> T:
    """A copy of nested dataclasses with the default at each of the dotted `keys` that has one."""
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
    new = _with_default(value, path[1:]) if path[1:] else default_of(found)
    return config if new is dataclasses.MISSING else dataclasses.replace(config, **{path[0]: new})
