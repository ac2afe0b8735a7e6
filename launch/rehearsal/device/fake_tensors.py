"""Fast execution of operations on fake tensors, with a cache of results by shapes and other arguments.

torch's fake mode computes the result of a new case. It has a cache too, but its look-up takes ten times as long, and a
step of DeepSeek-V3 has 300,000 operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class _Argument:
    """Result that is one of the arguments."""

    name: int | str

    def make(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return args[self.name] if isinstance(self.name, int) else kwargs[self.name]


@dataclass(frozen=True)
class _View:
    """Result that is a view of an argument."""

    of: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    state: dict[str, Any]
    """Attributes of the fake tensor."""

    def make(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        plain = torch.empty(0, dtype=self.dtype, device="meta")
        plain.set_(args[self.of].untyped_storage(), self.offset, self.shape, self.stride)
        return _as_fake(plain, self.state)


@dataclass(frozen=True)
class _New:
    """Result in new memory."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    state: dict[str, Any]

    def make(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return _as_fake(torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta"), self.state)


_Recipe = _Argument | _View | _New


@dataclass(frozen=True)
class _Recipes:
    """Recipes of all results of one case."""

    results: tuple[_Recipe, ...]
    container: type | None
    """Tuple or list; None for a single result."""


class _Uncacheable(Exception):  # noqa: N818 -- a signal, not an error
    """Raised for an argument or a result that cannot be cached."""


class FakeTensorExecutor:
    """Execution of operations on fake tensors. No dispatch mode may be active, as inside `__torch_dispatch__`."""

    def __init__(self) -> None:
        self.fake_tensor_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._recipes: dict[Any, _Recipes | None] = {}

    def run_operation(self, func: Any, types: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the result of `func` for arguments of which at least one is fake or names the device."""
        try:
            key = (func, _key(args), _key(kwargs.items()) if kwargs else None)
            known = self._recipes.get(key, _NEW)
        except (_Uncacheable, TypeError):
            return self.fake_tensor_mode.dispatch(func, types, args, kwargs)
        if known is _NEW:
            _check_product(func, args)
            out = self.fake_tensor_mode.dispatch(func, types, args, kwargs)
            is_changed = _key(args) != key[1]  # by an operation such as `resize_`
            self._recipes[key] = None if is_changed else _recipes(out, args, kwargs)
            return out
        if known is None:
            return self.fake_tensor_mode.dispatch(func, types, args, kwargs)
        assert isinstance(known, _Recipes)
        if known.container is None:
            return known.results[0].make(args, kwargs)
        return known.container(result.make(args, kwargs) for result in known.results)


_NEW = object()
_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "dot")


def _check_product(func: Any, args: Sequence[Any]) -> None:
    """Raise `RuntimeError`, as a GPU does, for a product of several dtypes, which torch's fake kernels accept."""
    if func._schema.name.removeprefix("aten::") in _PRODUCTS:
        dtypes = list(dict.fromkeys(str(each.dtype) for each in args if isinstance(each, Tensor)))
        if len(dtypes) > 1:
            raise RuntimeError(f"{func} takes {' and '.join(dtypes)}: tensors of a product have one dtype")


def _key(values: Any) -> tuple[Any, ...]:
    """Return the cache key of arguments. It holds the types of numbers, since 1 and 1.0 are equal."""
    key: list[Any] = []
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if value.constant is not None:
                raise _Uncacheable
            key += (value.shape, value.stride(), value.storage_offset(), value.dtype, value._fake_device)
        elif kind in _PLAIN:
            key += (kind, value)
        elif kind in (tuple, list, torch.Size):
            key += (kind, _key(value))
        elif isinstance(value, Tensor):
            key += (kind, value.shape, value.stride(), value.dtype, value.device)
        elif isinstance(value, torch.Generator):
            key.append(kind)
        else:
            raise _Uncacheable
    return tuple(key)


def _recipes(out: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Recipes | None:
    """Return the recipes of a result; None if it cannot be cached."""
    several = isinstance(out, (tuple, list))
    try:
        results = tuple(_recipe(each, args, kwargs) for each in (out if several else (out,)))
    except _Uncacheable:
        return None
    storages = [each.untyped_storage()._cdata for each in out] if several else []
    made = [storage for storage, result in zip(storages, results, strict=False) if isinstance(result, _New)]
    if len(set(made)) != len(made):
        return None
    return _Recipes(results, type(out) if several else None)


def _recipe(out: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Recipe:
    if type(out) is not FakeTensor or out.constant is not None:
        raise _Uncacheable
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for name, value in named:
        if value is out:
            return _Argument(name)
    state = dict(vars(out))
    if any(isinstance(value, Tensor) for value in state.values()):
        raise _Uncacheable
    storage = out.untyped_storage()
    for place, value in enumerate(args):
        if type(value) is FakeTensor and value.untyped_storage()._cdata == storage._cdata:
            return _View(place, out.shape, out.stride(), int(out.storage_offset()), out.dtype, state)
    nested = [value for each in (*args, *kwargs.values()) if isinstance(each, (tuple, list)) for value in each]
    taken = [value for value in (*nested, *kwargs.values()) if isinstance(value, Tensor)]
    if out.storage_offset() or any(value.untyped_storage()._cdata == storage._cdata for value in taken):
        raise _Uncacheable
    plain = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device="meta")
    if plain.untyped_storage().nbytes() != storage.nbytes():
        raise _Uncacheable
    return _New(out.shape, out.stride(), out.dtype, state)


def _as_fake(plain: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Wrap a meta tensor in a fake tensor with the attributes of one that torch created."""
    made: Tensor = Tensor._make_subclass(
        FakeTensor, plain, False, dispatch_device=True, device_for_backend_keys=state["_fake_device"]
    )
    vars(made).update(state)
    return made
