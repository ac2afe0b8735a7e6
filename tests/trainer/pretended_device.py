"""Simulates on a CPU which tensors would be on the device of a GPU run, and where the host would wait for it."""

import traceback
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

# Python reads the numbers.
LOOKS = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__", "__array__"}
# The shape of the result depends on the numbers.
SIZED_BY_DATA = {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount"}


class PretendedDevice(TorchFunctionMode):
    """Tensors made without a device are on the host, as those that come by `cpu()`; all others are on the device.

    `waits` counts what makes the host wait, by the name of the function that does so.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self._on_host = WeakIdKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = (resolve_name(func) or getattr(func, "__name__", "?")).rpartition(".")[2]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name == "__get__":  # an attribute
            return func(*args, **kwargs)
        device = kwargs.get("device") or next((x for x in args if isinstance(x, torch.device)), None)
        from_host = all(x in self._on_host for x in tensors)
        if name == "cpu":
            self._count(not from_host)
            return self._mark(func(*args, **kwargs).clone())
        if name in LOOKS | SIZED_BY_DATA or _is_masked(name, args):
            self._count(not from_host)
        if name == "copy_" and tensors[0] in self._on_host:
            self._count(not from_host and not kwargs.get("non_blocking", False))
        if name in ("tensor", "as_tensor") and device is not None:
            self._count(True)
        if name == "to" and device is not None:
            self._count(from_host and not kwargs.get("non_blocking", False))
            return func(*args, **kwargs).clone()
        result = func(*args, **kwargs)
        return self._mark(result) if from_host and device is None else result

    def _mark(self, result: Any) -> Any:
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._on_host[x] = True
        return result

    def _count(self, waits: bool) -> None:
        """Count under the calling function of this package."""
        if waits:
            frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
            self.waits[next(f.name for f in reversed(frames) if f.filename != __file__)] += 1


def _is_masked(name: str, args: Any) -> bool:
    """Return whether a tensor is indexed by a mask."""
    if name not in ("__getitem__", "__setitem__"):
        return False
    return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1]))
