"""Fake GPU: operations on fake CUDA tensors are counted and compute nothing; operations on host tensors run.

The dispatch mode sees every operation of torch. Operations on device tensors run on fake tensors, which have shape,
dtype and device, but no memory. Operations on host tensors compute, so that Python can read the values; only large host
tensors, which nothing reads, are fake too. A `DeviceReadback` supplies the values of copies from device to host.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from .fake_tensors import FakeTensorExecutor
from .recorder import RankRecorder

_LARGE = 2**20
"""Size in elements from which a host tensor is fake: weights and their EMA."""
_aten = torch.ops.aten
_EMPTY = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "empty_permuted")
_COPY = _aten.copy_.default
_TO_COPY = _aten._to_copy.default
_ITEM = _aten._local_scalar_dense.default
_DEVICE = torch.ops.prim.device.default
_PIN = _aten._pin_memory.default
_CROSSING = (_COPY, _TO_COPY, _ITEM)


class DeviceReadback(Protocol):
    """Source of the values that a GPU would have computed."""

    def read(self, tensor: Tensor) -> Tensor:
        """Return a host tensor of values with the shape and dtype of the device tensor that is read now."""
        ...


@dataclass(frozen=True)
class _Kind:
    """Properties of an operation that are known before it runs."""

    name: str
    is_free: bool
    """True if it launches no kernel: a view, or memory that is not filled."""
    is_view: bool
    is_collective: bool
    is_factory: bool
    """True if it takes no tensor."""
    is_like: bool
    """True if it creates a tensor like its argument."""


class FakeDeviceMode(TorchDispatchMode):
    """Dispatch mode that runs operations on fake tensors of `cuda:0` and records them."""

    def __init__(self, recorder: RankRecorder, readback: DeviceReadback) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder, self._readback = recorder, readback
        self._fakes = FakeTensorExecutor()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the wrapper that disables torch.compile, which is not used here, costs more than most operations

    def __enter__(self) -> "FakeDeviceMode":
        self._lifts_on_cpu = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch._C._set_only_lift_cpu_tensors(self._lifts_on_cpu)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation and record its launch."""
        if func is _DEVICE:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        kwargs = kwargs or {}
        self._recorder.operations += 1
        kind = _kind(func)
        if func is _PIN:
            return args[0]
        if FakeTensor not in types:
            return self._run_on_host(func, kind, types, args, kwargs)
        if kind.is_view:
            return self._fakes.run_operation(func, types, args, kwargs)
        if kind.is_collective:
            self._recorder.record_launch(f"c10d.{kind.name}", device_bytes_touched(list(_tensors(args))))
            return self._fakes.run_operation(func, types, args, kwargs)
        if func in _CROSSING:
            direction = _copy_direction(func, args, kwargs)
            if direction is not None:
                return self._copy_across(func, types, args, kwargs, *direction)
        if kind.is_like and _is_host(kwargs.get("device")) and args[0].numel() < _LARGE:
            return _on_host(func, args, kwargs)
        return self._run_on_device(func, kind, types, args, kwargs)

    def record_kernel(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Record a kernel launch that torch does not dispatch."""
        for place, tensor in enumerate(tensors):
            if not is_fake_device_tensor(tensor):
                self._recorder.record_finding("device", f"argument {place} of kernel {name} is a {_describe(tensor)}")
        self._recorder.record_launch(name, device_bytes_touched(tensors))

    def _run_on_host(self, func: Any, kind: _Kind, types: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation without fake arguments."""
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            if func is _TO_COPY:
                return self._upload(args[0], kwargs)
            return self._run_on_device(func, kind, types, args, kwargs)
        if kind.is_factory and args and _elements(args[0]) >= _LARGE:
            return self._fakes.run_operation(func, types, args, _unpinned(kwargs))
        return func(*args, **_unpinned(kwargs))

    def _run_on_device(self, func: Any, kind: _Kind, types: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        inputs = list(_tensors(args))
        if kwargs:
            inputs += _tensors(kwargs.values())
        if len(inputs) > 1 and func is not _COPY:
            args, kwargs = self._move_to_device(kind, inputs, args, kwargs)
        out = self._fakes.run_operation(func, types, args, _unpinned(kwargs))
        outputs = (out,) if isinstance(out, Tensor) else list(_tensors(out)) if isinstance(out, (tuple, list)) else ()
        on_device = [tensor for tensor in outputs if is_fake_device_tensor(tensor)]
        for tensor in on_device:
            self._recorder.memory.add_tensor(tensor)
        if kind.is_free or not (on_device or any(map(is_fake_device_tensor, inputs))):
            return out
        self._recorder.record_launch(kind.name, device_bytes_touched([*inputs, *outputs]))
        return out

    def _move_to_device(
        self, kind: _Kind, inputs: Sequence[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """Record host tensors among device tensors as findings, and continue as if they were on the device."""
        wrong = [tensor for tensor in inputs if not is_fake_device_tensor(tensor) and tensor.dim() > 0]
        if not wrong or len(wrong) == len(inputs):
            return args, kwargs
        for tensor in wrong:
            text = f"{kind.name} takes a {_describe(tensor)} together with device tensors"
            self._recorder.record_finding("device", text)
        moved = {id(tensor): self._empty(tensor) for tensor in wrong}
        on_device: tuple[Sequence[Any], Mapping[str, Any]] = tree_map_only(
            Tensor, lambda tensor: moved.get(id(tensor), tensor), (tuple(args), dict(kwargs))
        )
        return on_device

    def _copy_across(
        self, func: Any, types: Any, args: Sequence[Any], kwargs: Mapping[str, Any], to_host: bool, waits: bool
    ) -> Any:
        """Run a copy between host and device; `waits` tells whether the host waits for it."""
        recorder = self._recorder
        if waits:
            recorder.record_host_wait(None, recorder.stream, "read" if to_host else "synchronize")
        if func is _ITEM:
            return self._readback.read(args[0]).item() if to_host else 1
        if not to_host:
            out = self._fakes.run_operation(func, types, args, kwargs)
            recorder.memory.add_tensor(out)
            recorder.record_launch("copy to device", device_bytes_touched([out]))
            return out
        target, source = args[:2] if func is _COPY else (None, args[0])
        recorder.record_launch("copy to host", device_bytes_touched([source]))
        if isinstance(target, FakeTensor) or source.numel() >= _LARGE:
            return self._fakes.run_operation(func, types, args, kwargs)
        answer = self._readback.read(source)
        return answer.to(kwargs.get("dtype") or answer.dtype) if target is None else target.copy_(answer)

    def _upload(self, tensor: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """Copy a host tensor to the device."""
        if not kwargs.get("non_blocking"):
            self._recorder.record_host_wait(None, self._recorder.stream, "synchronize")
        out = self._empty(tensor, kwargs.get("dtype"))
        self._recorder.record_launch("copy to device", device_bytes_touched([tensor, out]))
        return out

    def _empty(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Create a device tensor with the shape and strides of a host tensor."""
        func = _aten.empty_strided.default
        kwargs = {"dtype": dtype or like.dtype, "device": torch.device("cuda", 0)}
        out: Tensor = self._fakes.run_operation(func, (), (like.shape, like.stride()), kwargs)
        self._recorder.memory.add_tensor(out)
        return out


def is_fake_device_tensor(tensor: Tensor) -> bool:
    """Return whether a tensor is on the fake device."""
    return isinstance(tensor, FakeTensor) and tensor._fake_device.type == "cuda"


def device_bytes_touched(tensors: Sequence[Tensor]) -> int:
    """Return the device bytes that a kernel touches; each distinct tensor and each expanded dimension counts once."""
    if len(tensors) == 1:
        return _touched(tensors[0])
    total = 0
    seen: list[Tensor] = []
    for tensor in tensors:
        if not any(_is_same(tensor, other) for other in seen):
            seen.append(tensor)
            total += _touched(tensor)
    return total


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a is b or (
        a.shape == b.shape
        and a.storage_offset() == b.storage_offset()
        and bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)
    )


def _touched(tensor: Tensor) -> int:
    """Return the device bytes of one tensor."""
    if not is_fake_device_tensor(tensor):
        return 0
    size = tensor.element_size()
    if tensor.is_contiguous():
        return tensor.numel() * size
    return size * prod(length for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)


@cache
def _kind(func: Any) -> _Kind:
    schema = func._schema
    name = schema.name.partition("::")[2]
    is_view = all(each.alias_info is not None and not each.alias_info.is_write for each in schema.returns)
    is_view = (bool(schema.returns) and is_view) or name == "_unsafe_view"
    takes_tensor = any("Tensor" in str(argument.type) for argument in schema.arguments)
    return _Kind(
        name=name,
        is_free=is_view or name in _EMPTY or schema.name.startswith("prim"),
        is_view=is_view,
        is_collective=schema.name.startswith(("c10d", "_c10d")),
        is_factory=not takes_tensor,
        is_like=takes_tensor and (name.endswith("_like") or name.startswith("new_")),
    )


def _copy_direction(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[bool, bool] | None:
    """Return whether a copy goes to the host and whether the host waits for it; None for a copy on one side."""
    if func is _ITEM:
        on_device = is_fake_device_tensor(args[0])
        return on_device, on_device
    if func is _COPY:
        source, target = is_fake_device_tensor(args[1]), is_fake_device_tensor(args[0])
        is_async = bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        is_scalar = args[1].dim() == 0 and not isinstance(args[1], FakeTensor)  # goes with the launch
        return None if source == target or is_scalar else (source, not is_async)
    device = kwargs.get("device")
    if device is None:
        return None
    source, target = is_fake_device_tensor(args[0]), torch.device(device).type == "cuda"
    return None if source == target else (source, not kwargs.get("non_blocking"))


def _is_host(device: object) -> bool:
    return device is not None and torch.device(device).type == "cpu"  # type: ignore[call-overload]


def _on_host(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Create a small host tensor like a device tensor."""
    like = torch.empty_strided(args[0].shape, args[0].stride(), dtype=args[0].dtype)
    return func(like, *args[1:], **_unpinned(kwargs))


def _elements(size: object) -> int:
    return prod(size) if isinstance(size, (tuple, list)) and all(isinstance(each, int) for each in size) else 0


def _unpinned(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `kwargs` without pinned memory, which is ordinary memory here."""
    return {**kwargs, "pin_memory": False} if kwargs.get("pin_memory") else kwargs


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} host tensor {list(tensor.shape)}"
