"""Attention output in E5M6, saved once for two backwards: of attention and of the Linear after it (report §3.3.3).

A fused attention saves its output for its backward. In FP8 the Linear after it saves the same numbers in E5M6 for its
weight gradient. Both backwards read this E5M6 copy, as in the report, and the wide output is freed with the forward.

Among the tensors that autograd saves, the output is recognized by its memory, because its view differs: cuDNN's and the
memory-efficient kernel save it as [B, H, S, V], FlashAttention-3 as [B, S, H, V]. The backends `math` and `blocks` (for
CPUs) do not save it, so this changes nothing for them.

Letters: B batch, H heads, S sequence, W width of queries and keys, V of values.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..model.recompute import pack_for_backward, unpack_for_backward
from .e5m6 import E5M6Rows, unpack_e5m6


@dataclass
class _Place:
    """Placeholder that autograd saves instead of a tensor."""

    tensor: Tensor | None
    """Wide tensor, until E5M6 replaces it."""
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


class SharedAttentionOutput:
    """Output of one attention, shared by the backwards of attention and of the Linear after it."""

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._packed: E5M6Rows | None = None
        self._layout: _Place | None = None

    def run_attention(
        self, attention: Callable[..., Tensor], q_BHSW: Tensor, k_BHSW: Tensor, v_BHSV: Tensor, *others: Any
    ) -> Tensor:
        """Run `attention` and return its output [B, H, S, V]; this object holds what autograd saves of the output."""
        size = v_BHSV.numel()  # a number, since the hooks below would hold a tensor as long as the saved tensors
        inputs = {_memory(x) for x in (q_BHSW, k_BHSW, v_BHSV)}

        def keep(tensor: Tensor) -> Any:
            if tensor.numel() != size or _memory(tensor) in inputs:
                return pack_for_backward(tensor)
            self._places.append(_place(tensor))
            return self._places[-1]

        with saved_tensors_hooks(keep, self._kept):
            out_BHSV = attention(q_BHSW, k_BHSW, v_BHSV, *others)
        out = _memory(out_BHSV)
        self._places = [place for place in self._places if place.tensor is not None and _memory(place.tensor) == out]
        self._layout = replace(_place(out_BHSV), tensor=None)
        return out_BHSV

    def replace_with_e5m6(self, packed: E5M6Rows) -> None:
        """Replace the wide output by its E5M6 numbers, [B · S, H · V]."""
        self._packed = packed
        for place in self._places:
            place.tensor = None

    def _kept(self, kept: Any) -> Tensor:
        if not isinstance(kept, _Place):
            found: Tensor = unpack_for_backward(kept)
            return found
        if kept.tensor is not None:
            return kept.tensor
        assert self._packed is not None
        assert self._layout is not None
        batch, heads, length, width = self._layout.shape
        rows_BHSV = unpack_e5m6(self._packed, kept.dtype).view(batch, length, heads, width).transpose(1, 2)
        out_BHSV = torch.empty_strided(
            self._layout.shape, self._layout.stride, dtype=kept.dtype, device=rows_BHSV.device
        ).copy_(rows_BHSV)
        return out_BHSV.as_strided(kept.shape, kept.stride, kept.offset - self._layout.offset)


def _place(tensor: Tensor) -> _Place:
    return _Place(tensor, tensor.shape, tensor.stride(), int(tensor.storage_offset()), tensor.dtype)


def _memory(tensor: Tensor) -> int:
    """Return an identity of the memory of `tensor`, valid while it is allocated."""
    # Not the address, which all fake tensors share.
    storage: int = tensor.untyped_storage()._cdata
    return storage
