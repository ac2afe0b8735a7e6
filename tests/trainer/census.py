"""A census of live memory among allocations."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class Census(TorchDispatchMode):
    """Tracks every storage that is allocated inside, until it is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in held:
                self._storages[tensor.untyped_storage()] = func
        return result

    def leave_out(self, tensor: Tensor) -> None:
        """Stop counting this tensor's memory."""
        self._storages.pop(tensor.untyped_storage(), None)

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages)
