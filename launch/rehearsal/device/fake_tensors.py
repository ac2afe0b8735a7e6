"""Fast execution of operations on fake tensors, with a cache of results by shapes and other arguments.

torch's fake mode computes the result of a new case. It has a cache too, but its look-up takes ten times as long, and a
step of DeepSeek-V3 has 300,000 operations.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


_Recipe = Callable[[Sequence[Any], Mapping[str, Any]], Any]
"""Function that makes a result from the arguments and keyword arguments of its operation."""


class _Uncacheable(Exception):  # noqa: N818 -- a signal, not an error
    """Raised for an argument or a result that cannot be cached."""


class FakeTensorExecutor:
    """Execution of operations on fake tensors. No dispatch mode may be active, as inside `__torch_dispatch__`."""

    def __init__(self) -> None:
        self.fake_tensor_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._recipes: dict[Any, _Recipe | None] = {}

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
            self._recipes[key] = None if is_changed else _recipe(out, args, kwargs)
            return out
        if known is None:
            return self.fake_tensor_mode.dispatch(func, types, args, kwargs)
        return known(args, kwargs)


_NEW: Any = object()
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


def _recipe(out: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Recipe | None:
    """Return the recipe of a tensor, or of a tuple or list of tensors; None if it cannot be cached."""
    container, new_storages = type(out), list[int]()
    try:
        if not isinstance(out, (tuple, list)):
            return _tensor_recipe(out, args, kwargs, new_storages)
        recipes = [_tensor_recipe(each, args, kwargs, new_storages) for each in out]
    except _Uncacheable:
        return None
    if len(set(new_storages)) != len(new_storages):
        return None
    return lambda args, kwargs: container(make(args, kwargs) for make in recipes)


def _tensor_recipe(out: Any, args: Sequence[Any], kwargs: Mapping[str, Any], new_storages: list[int]) -> _Recipe:
    """Return the recipe of one tensor; a storage that is in no argument is added to `new_storages`."""
    if type(out) is not FakeTensor or out.constant is not None:
        raise _Uncacheable
    for place, value in enumerate(args):
        if value is out:
            return lambda args, kwargs: args[place]
    for name, value in kwargs.items():
        if value is out:
            return lambda args, kwargs: kwargs[name]
    # The recipes outlive the call: they hold no tensor, whose memory would count as live.
    shape, stride, dtype, state = out.shape, out.stride(), out.dtype, dict(vars(out))
    if any(isinstance(value, Tensor) for value in state.values()):
        raise _Uncacheable
    storage, offset = out.untyped_storage(), int(out.storage_offset())
    owner = next((place for place, value in enumerate(args) if _has_storage(value, storage)), -1)

    def make_view(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        plain = torch.empty(0, dtype=dtype, device="meta")
        plain.set_(args[owner].untyped_storage(), offset, shape, stride)
        return _as_fake(plain, state)

    if owner >= 0:
        return make_view
    nested = [value for each in (*args, *kwargs.values()) if isinstance(each, (tuple, list)) for value in each]
    if offset or any(_has_storage(value, storage) for value in (*nested, *kwargs.values())):
        raise _Uncacheable
    plain = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    if plain.untyped_storage().nbytes() != storage.nbytes():
        raise _Uncacheable
    new_storages.append(storage._cdata)
    return lambda args, kwargs: _as_fake(torch.empty_strided(shape, stride, dtype=dtype, device="meta"), state)


def _has_storage(value: Any, storage: UntypedStorage) -> bool:
    return isinstance(value, Tensor) and bool(value.untyped_storage()._cdata == storage._cdata)


def _as_fake(plain: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Wrap a meta tensor in a fake tensor with the attributes of one that torch created."""
    made: Tensor = Tensor._make_subclass(
        FakeTensor, plain, False, dispatch_device=True, device_for_backend_keys=state["_fake_device"]
    )
    vars(made).update(state)
    return made
