"""Whether two tensors lie in the same memory."""

from __future__ import annotations

from torch import Tensor


def share_storage(a: Tensor, b: Tensor) -> bool:
    """Whether both are views of one storage, at whatever places. Fake tensors have storages, and no addresses."""
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata
