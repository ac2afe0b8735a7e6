"""What attention gives, kept once for two backwards: its own and that of the Linear behind it, in E5M6 (report §3.3.3).

A fused attention keeps its output for its backward. In FP8 the Linear behind it keeps the same numbers for its weight,
in E5M6; here both read these, as in the report, and the wide output goes with the forward.

The output is found among what autograd keeps by its memory, whatever its view: cuDNN's and the memory-efficient kernel
keep it as [B, H, S, V], FlashAttention-3 as [B, S, H, V]. Plain products with all scores in memory (`math`), and the
blocks for CPUs, do not keep it: they find nothing here, and their memory is as it was.

Letters: B batch, H heads, S sequence, W width of queries and keys, V of values.
"""

from __future__ import annotations

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
    """Stands for a tensor where autograd keeps it."""

    tensor: Tensor | None
    """Until it is packed."""
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


class SharedAttentionOutput:
    """The output of one attention."""

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self._packed: E5M6Rows | None = None
        self._layout: _Place | None = None

    def run_attention(
        self, attention: Callable[..., Tensor], q_BHSW: Tensor, k_BHSW: Tensor, v_BHSV: Tensor, *others: Any
    ) -> Tensor:
        """What `attention` gives, [B, H, S, V]. What its backward keeps of that will be here."""
        size = v_BHSV.numel()  # and no tensor: autograd holds these functions as long as what they keep
        inputs = {_memory(x) for x in (q_BHSW, k_BHSW, v_BHSV)}

        def keep(tensor: Tensor) -> Any:
            if tensor.numel() != size or _memory(tensor) in inputs:
                return pack_for_backward(tensor)
            self._places.append(_place(tensor))
            return self._places[-1]

        with saved_tensors_hooks(keep, self._kept):
            out_BHSV = attention(q_BHSW, k_BHSW, v_BHSV, *others)
        self._places = [place for place in self._places if _is_in(place.tensor, out_BHSV)]
        self._layout = replace(_place(out_BHSV), tensor=None)
        return out_BHSV

    def replace_with_e5m6(self, packed: E5M6Rows) -> None:
        """The same numbers, [B · S, H · V], in the place of the wide ones."""
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


def _is_in(tensor: Tensor | None, other: Tensor) -> bool:
    assert tensor is not None
    return _memory(tensor) == _memory(other)


def _memory(tensor: Tensor) -> int:
    """What the memory of `tensor` is known by while it lives. Fake tensors share an address, and not this."""
    storage: int = tensor.untyped_storage()._cdata
    return storage
